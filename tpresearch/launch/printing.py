"""Printing never decides a run's fate: not a terminal that lacks a letter, nor one that has gone."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress


class Unfailing(io.TextIOWrapper):
    """A text stream that writes what it can: letters that its encoding lacks as `\\u2013`, and to a closed pipe nothing."""

    def write(self, text: str) -> int:
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except BrokenPipeError:  # what is left in the buffer would be tried again at the interpreter's end
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        except OSError:
            pass


def print_without_fail() -> None:
    """Make stdout and stderr such streams, for the rest of this process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            stream.flush()
            lines, through, encoding = stream.line_buffering, stream.write_through, stream.encoding
            unfailing = Unfailing(
                stream.detach(), encoding, "backslashreplace", line_buffering=lines, write_through=through
            )
            setattr(sys, name, unfailing)
