"""What is said of a sweep's running jobs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from tpresearch.ledger.entries import Expected, MemoryUse, StepLedger
from tpresearch.sweep.job import Job
from tpresearch.sweep.status import PLAIN_INTERVAL_S, LiveStatus, last_row, status_line
from tpresearch.track.names import complete_row
from tpresearch.track.record import write_ledger
from tpresearch.track.table import with_comparable_memory
from tpresearch.track.text import bytes_text


def job(folder: Path, number: int = 3) -> Job:
    return Job(number, [], folder, 2, 2, False, "", "", [], OmegaConf.create(), steps=100)


def logged(folder: Path, steps: int, **more: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(1, steps + 1):
            row = {"train/step": step, "train/loss": 8 - step / 10, "perf/step_time_s": 0.5}
            row |= {f"memory/{name}": value for name, value in more.items()}
            file.write(json.dumps(complete_row(row)) + "\n")


@pytest.mark.parametrize("steps", [0, 1, 2, 40])
def test_the_last_row_is_the_last_that_is_whole(tmp_path: Path, steps: int) -> None:
    assert last_row(job(tmp_path)) is None
    logged(tmp_path, steps)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": 99, "train/l')
    row = last_row(job(tmp_path))
    assert (row and row["train/step"]) == (steps or None)


@pytest.mark.parametrize("terminal", [True, False])
def test_running_jobs_are_shown_once_per_interval(tmp_path: Path, terminal: bool) -> None:
    out, now = io.StringIO(), 0.0
    console = Console(file=out, width=100, force_terminal=terminal)
    for name in ("3", "4"):
        (tmp_path / name).mkdir()
    logged(tmp_path / "3", 40)
    with LiveStatus(console, clock=lambda: now) as status:
        for _ in range(3):
            status.show([job(tmp_path / "3", 3), job(tmp_path / "4", 4)])
        line, seen = "job 3  step 40/100  loss 4.000  0:30 left\njob 4  before its first step", out.getvalue()
        assert seen.count(line) == int(terminal)
        now = PLAIN_INTERVAL_S
        status.show([job(tmp_path / "3", 3), job(tmp_path / "4", 4)])
        assert out.getvalue().removeprefix(seen).count(line) == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_memory_is_that_of_the_sweeps_table(tmp_path: Path, device: str) -> None:
    """On a CPU that of tensors, once a step has been counted, and not of the process, most of which is torch."""
    of_allocator = {"reserved_bytes": 3 << 30} if device == "cuda" else {}
    logged(tmp_path, 2, peak_bytes=2 << 30, **of_allocator)
    before = status_line(job(tmp_path), last_row(job(tmp_path)))
    held = [MemoryUse("parameters", 5 << 20, 5 << 20), MemoryUse("activations", 9 << 20, 6 << 20)]
    counted = StepLedger([], held, None, Expected(None, {}))
    write_ledger(tmp_path, counted.as_json())
    after = status_line(job(tmp_path), last_row(job(tmp_path)))
    if device == "cuda":
        assert before == after == "job 3  step 2/100  loss 7.800  2.0 GiB  0:49 left"
        return
    assert (before, after) == (
        "job 3  step 2/100  loss 7.800  0:49 left",
        "job 3  step 2/100  loss 7.800  11.0 MiB  0:49 left",
    )
    shown = with_comparable_memory({"device": device, **counted.summary()})
    assert bytes_text(shown["memory/peak_bytes"]) in after


def test_what_runs_nothing_shows_nothing(tmp_path: Path) -> None:
    out, now = io.StringIO(), 0.0
    with LiveStatus(Console(file=out), clock=lambda: now) as status:
        now = PLAIN_INTERVAL_S
        status.show([])
    assert out.getvalue() == ""
