"""What is being done: a line in the log for each stage, and a bar on stderr where one was asked for."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

log = logging.getLogger(__name__)

Advance = Callable[[int], None]


@contextmanager
def stage(what: str, total_bytes: int | None, bar: bool) -> Iterator[Advance]:
    """Report a stage; yields a function that takes the bytes done since it was last called.

    Args:
        what: the stage in a few words, such as "tokenizing".
        total_bytes: None where it is not known how far there is to go.
        bar: whether to draw a progress bar, which is done only where stderr is a terminal.
    """
    started = time.perf_counter()
    done = 0
    with _bar(what, total_bytes) if bar and sys.stderr.isatty() else nullcontext(lambda count: None) as draw:

        def advance(count: int) -> None:
            nonlocal done
            done += count
            draw(count)

        yield advance
    log.info("%s: %.1f MB in %.1f s", what, done / 1e6, time.perf_counter() - started)


@contextmanager
def _bar(what: str, total_bytes: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as drawn:
        task = drawn.add_task(what, total=total_bytes)
        yield lambda count: drawn.advance(task, count)
