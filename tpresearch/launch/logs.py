"""Routing of log lines: rank 0 to the console and `train.log`, every rank to its own file. Printing never ends a run: neither on a
terminal that lacks a character, nor on one that has gone."""

from __future__ import annotations

import faulthandler
import io
import logging
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tpresearch.config.world import World

IN_FILES_ONLY = {"console": False}
"""`extra` of a log call whose content the console shows in another way."""

LIBRARY_LEVELS = {
    **dict.fromkeys(["datasets", "filelock", "fsspec", "git", "httpx", "huggingface_hub"], logging.WARNING),
    **dict.fromkeys(["matplotlib", "tokenizers", "torch"], logging.WARNING),
    **dict.fromkeys(["urllib3", "wandb"], logging.ERROR),
}
"""Minimum level of libraries' log records."""


def start_logging(folder: Path, world: World) -> None:
    """Send log records and Python's warnings to the run folder, and rank 0's also to stderr.

    Other ranks log to `ranks/rank-<rank>.log`, where a rank under torchrun that crashes in native code
    leaves its Python stack too. A library's warning is written once, however often it is repeated. A second call replaces
    the first.
    """
    (folder / "ranks").mkdir(exist_ok=True)
    own = folder / "ranks" / f"rank-{world.rank:05d}.log"
    handlers: list[logging.Handler] = [_file(own)]
    if world.elastic:
        faulthandler.enable(own.open("a"))
    if world.rank == 0:
        handlers += [_file(folder / "train.log"), _console()]
    for handler in handlers:
        handler.addFilter(_warn_once())
    logging.basicConfig(level=logging.INFO, handlers=handlers, force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # on a full disk only the line is lost
    for library, level in LIBRARY_LEVELS.items():
        logging.getLogger(library).setLevel(level)
    if "TORCH_LOGS" not in os.environ:
        _route_torch_logs()


def _route_torch_logs() -> None:
    """Let torch's records reach our handlers: importing it gives its loggers a handler to stderr on each rank.

    Whoever sets `TORCH_LOGS` has chosen what to see and where. Checked on torch 2.13 and 2.14.
    """
    import torch  # noqa: F401  its import resets its loggers, so it comes first

    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "torch" and name != "torch.__trace" and isinstance(logger, logging.Logger):
            logger.handlers.clear()
            speaks_unasked = not name.rpartition(".")[2].startswith("__")  # unlike such as `...__annotation`
            logger.propagate = logger.propagate or speaks_unasked


def _file(path: Path) -> logging.Handler:
    handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    return handler


def _console() -> logging.Handler:
    console = logging.StreamHandler(sys.stderr)
    console.setFormatter(ShortFormat("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    console.addFilter(lambda record: getattr(record, "console", True))
    return console


class ShortFormat(logging.Formatter):
    """Names the level from WARNING upwards; a library's warning is a line, a Python one's without its line of source, which is
    left to the files."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        line = super().formatMessage(record)
        if record.name == "py.warnings":
            line = line.splitlines()[0]
        elif record.levelno >= logging.WARNING and not record.name.startswith("tpresearch"):
            line = " ".join(line.split())
        return line if record.levelno < logging.WARNING else f"{line} [{record.levelname.lower()}]"


def _warn_once() -> Callable[[logging.LogRecord], bool]:
    """A filter that lets a library's warning through once: torch repeats the same one for each block and each step."""
    seen: set[str] = set()

    def is_news(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or record.name.startswith("tpresearch"):
            return True
        try:
            text = record.getMessage()
        except Exception:  # the library's arguments do not fit its text, which is written as it is
            text, record.args = str(record.msg), None
        before = len(seen)
        seen.add(text)
        return len(seen) > before

    return is_news


class TolerantStream(io.TextIOWrapper):
    """A text stream that never raises: characters that its encoding lacks become `\\u2013`, and a closed pipe is ignored."""

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


def tolerate_print_errors() -> None:
    """Make stdout and stderr a `TolerantStream`, for the rest of this process."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            stream.flush()
            lines, through, encoding = stream.line_buffering, stream.write_through, stream.encoding
            unfailing = TolerantStream(
                stream.detach(), encoding, "backslashreplace", line_buffering=lines, write_through=through
            )
            setattr(sys, name, unfailing)
            for logger in (logging.root, *logging.root.manager.loggerDict.values()):
                for handler in getattr(logger, "handlers", ()):  # torch's, where it was imported before
                    if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                        handler.stream = unfailing
