"""Progress of a sweep's running jobs: a live line for each on a terminal, otherwise an occasional line."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.text import Text

from tpresearch.sweep.job import Job
from tpresearch.track.console import format_row
from tpresearch.track.names import Row, step_of
from tpresearch.track.record import read_record

INTERVAL_S, PLAIN_INTERVAL_S = 1.0, 60.0
"""Seconds between two updates, on a terminal and elsewhere."""
TAIL_BYTES = 8192
"""Bytes read from the end of metrics.jsonl: more than two rows."""


class LiveStatus:
    """Shows running jobs while it is entered."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        live = Live(console=console, transient=True, auto_refresh=False)
        self._live = live if console.is_terminal else None
        self._next = clock() + (0 if self._live else PLAIN_INTERVAL_S)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *raised: object) -> None:
        if self._live:
            self._live.stop()

    def show(self, running: Sequence[Job]) -> None:
        """Update the display, at most once per interval."""
        if self._clock() < self._next:
            return
        self._next = self._clock() + (INTERVAL_S if self._live else PLAIN_INTERVAL_S)
        text = Text("\n".join(status_line(job, last_row(job)) for job in running))
        if self._live:
            self._live.update(text, refresh=True)
        elif running:
            self._console.print(text, soft_wrap=True)


def status_line(job: Job, row: Row | None) -> str:
    """`job 3  step 120/1000  loss 6.123  34.5k tok/s  1.2 GiB  1:23 left`"""
    if row is None:
        return f"job {job.number}  before its first step"
    step, per_step = step_of(row), row["perf/step_time_s"]
    left_s = (job.steps - step) * per_step if per_step else None
    return f"job {job.number}  step {step}/{job.steps}  {format_row(row, row['val/loss'], left_s)}"


def last_row(job: Job) -> Row | None:
    """The last complete row in a job's metrics.jsonl; on a CPU with the peak memory of its tensors, as in the sweep's table, in
    place of the process's."""
    with suppress(OSError, ValueError), (job.folder / "metrics.jsonl").open("rb") as file:
        file.seek(-min(TAIL_BYTES, file.seek(0, os.SEEK_END)), os.SEEK_END)
        *_, line, _ = [b"", *file.read().split(b"\n")]
        row: Row = json.loads(line)
        is_on_cpu = row.get("memory/reserved_bytes") is None
        return row | {"memory/peak_bytes": _tensors_peak_bytes(job)} if is_on_cpu else row
    return None


def _tensors_peak_bytes(job: Job) -> int | None:
    """None until a step has been counted, and where blocks are compiled."""
    with suppress(OSError, ValueError, LookupError):
        found: int | None = read_record(job.folder / "ledger.json")["memory"]["peak_bytes"]
        return found
    return None
