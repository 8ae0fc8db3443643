"""What is being done: a line in the log for each stage, and a bar on stderr where one was asked for."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)


@contextmanager
def stage(what: str, total_bytes: int | None, bar: bool) -> Iterator[Callable[[int], None]]:
    """Report a stage; yields a function that takes the bytes done since it was last called.

    Args:
        what: the stage in a few words, such as "tokenizing 661 files".
        total_bytes: null where it is not known how far there is to go.
        bar: whether to draw a progress bar, which is done only where stderr is a terminal.
    """
    started = time.perf_counter()
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if shown is not None:
            shown(count)

    shown: Callable[[int], None] | None = None
    if bar and sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
            task = drawn.add_task(what, total=total_bytes)
            shown = lambda count: drawn.advance(task, count)  # noqa: E731
            yield advance
    else:
        yield advance
    log.info("%s: %.1f MB in %.1f s", what, done / 1e6, time.perf_counter() - started)
