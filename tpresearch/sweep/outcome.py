"""How a job of a sweep ended, and the first cause of a failure."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tpresearch.config.errors import readable
from tpresearch.sweep.job import CONSOLE_LOG, STOPPED_CODE, Job
from tpresearch.track.record import read_record

Status = Literal["completed", "failed", "preempted", "not started"]
EXCEPTION_LINE = re.compile(
    r"(?m)^\s*(?:\[rank\d+\]:\s*)?(?:\w+\.)*(\w*(?:Error|Exception|Failure)\b(?::.*)?)$"
)
"""The last line of a traceback, starting with the exception's name."""
CAUSES = (
    re.compile(r"^(rank \d+ (?:ended|was ended) .*);", re.MULTILINE),  # of `tpresearch.agent`
    EXCEPTION_LINE,
    re.compile(r"traceback : (Signal .*)"),
)
"""What says in torchrun's report why a job failed, the best first."""


@dataclass(frozen=True)
class Outcome:
    job: Job
    status: Status
    seconds: float | None = None
    error: str | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    """The job's summary.json; empty if it left none."""
    log: Path | None = None
    """The log with the details of a failure."""


def outcome_of(job: Job, code: int | None, seconds: float | None = None) -> Outcome:
    """The outcome of a job, from its files. `code` is its exit code, None for one that was not started now."""
    if code is None and not job.completed:
        return Outcome(job, "not started")
    summary = _summary(job)
    if code is None:
        return Outcome(job, "completed", summary=summary)
    has_completed = summary.get("status") == "completed" and summary.get("steps") == job.steps
    if code == 0 or (code == STOPPED_CODE and has_completed):  # stopped as it ended
        return Outcome(job, "completed", seconds, None, summary)
    if summary.get("status") in ("preempted", "interrupted") or code == STOPPED_CODE:
        return Outcome(job, "preempted", seconds, summary.get("error", "stopped"), summary)
    error, log = _find_cause(job, code, summary)
    return Outcome(job, "failed", seconds, error, summary, log)


def _summary(job: Job) -> dict[str, Any]:
    try:
        summary = read_record(job.folder / "summary.json")
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def _find_cause(job: Job, code: int, summary: dict[str, Any]) -> tuple[str, Path]:
    """The first cause, and the log that has it: the refusal, the first failure that torchrun reports, the error of rank 0's
    summary, or the last exception in a log.

    Over several nodes each agent reports its own ranks, in its own log; the earliest of these failures is the cause.
    """
    main = job.folder / CONSOLE_LOG
    logs = {path: _read(path) for path in (main, *sorted(job.folder.glob("console-node*.log")))}
    for path, text in logs.items():
        if refused := re.findall(r"^error: (.*)$", text, re.MULTILINE):
            return str(refused[0]), path
    causes = []
    for path, text in logs.items():
        _, _, root_cause = text.partition("Root Cause (first observed failure)")
        if named := next(filter(None, (pattern.findall(root_cause) for pattern in CAUSES)), []):
            when = re.search(r"time +: (\S+)", root_cause)
            causes.append((when[1] if when else "", str(named[-1]).strip(), path))
    if causes:
        _, cause, path = min(causes)
        return readable(cause), path
    if summary.get("error"):
        return str(summary["error"]), main
    for path, text in logs.items():
        if named := EXCEPTION_LINE.findall(text):
            return readable(str(named[-1]).strip()), path
    return (f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"), main


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
