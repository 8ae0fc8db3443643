"""How a job of a sweep ended: its summary, and where it failed, why, in one line."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tpresearch.sweep.job import CONSOLE_LOG, Job
from tpresearch.sweep.running import STOPPED
from tpresearch.track.record import read_record

Status = Literal["completed", "failed", "preempted", "not started"]
EXCEPTION = re.compile(
    r"^\s*(?:\[rank\d+\]:\s*)?(?:\w+\.)*(\w*(?:Error|Exception|Failure)\b(?::.*)?)$", re.MULTILINE
)
"""The last line of a traceback, from the exception's own name on."""


@dataclass(frozen=True)
class Outcome:
    job: Job
    status: Status
    seconds: float | None = None
    error: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    """What the job's summary.json holds; empty where it left none."""
    log: Path | None = None
    """Where more is said of a failure."""


def outcome_of(job: Job, code: int | None, seconds: float | None = None) -> Outcome:
    """Read what the job left. `code` is its exit code, None for one that was not started now."""
    if code is None and not job.completed:
        return Outcome(job, "not started")
    summary = _summary(job)
    if code is None:
        return Outcome(job, "completed", summary=summary)
    if code == 0:
        return Outcome(job, "completed", seconds, None, summary)
    if summary.get("status") in ("preempted", "interrupted") or code == STOPPED:
        return Outcome(job, "preempted", seconds, summary.get("error", "stopped"), summary)
    error, log = _error(job, code, summary)
    return Outcome(job, "failed", seconds, error, summary, log)


def _summary(job: Job) -> dict[str, Any]:
    try:
        summary = read_record(job.folder / "summary.json")
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _error(job: Job, code: int, summary: dict[str, Any]) -> tuple[str, Path]:
    """The first cause, and the log that has it: as refused, as torchrun tells the first failure, as rank 0 saw it,
    as it was last said.

    Over several nodes each agent tells of its own ranks, in a log of its own; the earliest of these failures is the cause.
    """
    main = job.folder / CONSOLE_LOG
    logs = {path: _read(path) for path in (main, *sorted(job.folder.glob("console-node*.log")))}
    for path, said in logs.items():
        if refused := re.findall(r"^error: (.*)$", said, re.MULTILINE):
            return str(refused[0]), path
    causes = []
    for path, said in logs.items():
        _, _, root_cause = said.partition("Root Cause (first observed failure)")
        if named := EXCEPTION.findall(root_cause) or re.findall(r"traceback : (Signal .*)", root_cause):
            when = re.search(r"time +: (\S+)", root_cause)
            causes.append((when[1] if when else "", str(named[-1]).strip(), path))
    if causes:
        _, cause, path = min(causes)
        return cause, path
    if summary.get("error"):
        return str(summary["error"]), main
    for path, said in logs.items():
        if named := EXCEPTION.findall(said):
            return str(named[-1]).strip(), path
    return (f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"), main


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
