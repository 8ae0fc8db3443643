"""How a job of a sweep ended: its summary, and where it failed, why, in one line."""

from __future__ import annotations

import json
import re
import signal
from dataclasses import dataclass, field
from typing import Any, Literal

from tpresearch.launch.sweep.job import Job
from tpresearch.launch.sweep.running import CONSOLE_LOG, STOPPED

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


def outcome_of(job: Job, code: int | None, seconds: float | None = None) -> Outcome:
    """Read what the job left. `code` is its exit code, None for one that was not started now."""
    if code is None and not job.completed:
        return Outcome(job, "not started")
    summary = _summary(job)
    if code is None:
        return Outcome(job, "completed", summary=summary)
    if code == 0:
        return Outcome(job, "completed", seconds, None, summary)
    if summary.get("status") == "preempted" or code == STOPPED:
        return Outcome(job, "preempted", seconds, summary.get("error", "stopped"), summary)
    return Outcome(job, "failed", seconds, _error(job, code, summary), summary)


def _summary(job: Job) -> dict[str, Any]:
    try:
        summary: dict[str, Any] = json.loads((job.folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return summary


def _error(job: Job, code: int, summary: dict[str, Any]) -> str:
    """The first cause: as refused, as torchrun tells the first failure, as rank 0 saw it, as it was last said."""
    try:
        said = (job.folder / CONSOLE_LOG).read_text(encoding="utf-8", errors="replace")
    except OSError:
        said = ""
    if refused := re.findall(r"^error: (.*)$", said, re.MULTILINE):
        return str(refused[0])
    _, _, root_cause = said.partition("Root Cause (first observed failure)")
    if named := EXCEPTION.findall(root_cause) or re.findall(r"traceback : (Signal .*)", root_cause):
        return str(named[-1]).strip()
    if summary.get("error"):
        return str(summary["error"])
    if named := EXCEPTION.findall(said):
        return str(named[-1]).strip()
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
