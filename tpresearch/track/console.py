"""Terminal output of a run: a progress line while it trains, and a report when it ends."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from tpresearch.config.choices import Loss
from tpresearch.track.names import Row, step_of
from tpresearch.track.next_steps import NextSteps
from tpresearch.track.text import (
    UNDEFINED,
    bytes_text,
    count_text,
    duration_text,
    loss_text,
    path_text,
    share_text,
)

PLAIN_INTERVAL_S = 2.0
"""Seconds between two lines where the output is not a terminal."""


class ProgressLine:
    """Step, losses, speed, memory and time left: a live line on a terminal, else a line now and then.

    Args:
        total_steps: the step at which the run ends.
        start_step: the step from which the run starts or resumes.
    """

    def __init__(
        self,
        console: Console,
        total_steps: int,
        start_step: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console, self._total, self._clock = console, total_steps, clock
        self._first: tuple[int, float] | None = None
        self._val_loss: float | None = None
        self._printed_at, self._pending = -PLAIN_INTERVAL_S, ""
        self._live: Progress | None = None
        if console.is_terminal:
            step, figures = TextColumn("{task.description}"), TextColumn("{task.fields[figures]}")
            self._live = Progress(step, BarColumn(20), figures, console=console, refresh_per_second=4)
            self._task = self._live.add_task("step", total=total_steps, completed=start_step, figures="")
            self._live.start()

    def show(self, row: Row) -> None:
        """Show a logged row; off a terminal, the first, the last, and one every two seconds between."""
        step, now = step_of(row), self._clock()
        if row["val/loss"] is not None:
            self._val_loss = row["val/loss"]
        text = format_row(row, self._val_loss, self._left_s(step, now))
        counter = f"step {step:>{len(str(self._total))}}/{self._total}"
        if self._live:
            self._live.update(self._task, description=counter, completed=step, figures=text)
        elif now - self._printed_at >= PLAIN_INTERVAL_S or step == self._total:
            self._print(f"{counter}  {text}")
            self._printed_at, self._pending = now, ""
        else:
            self._pending = f"{counter}  {text}"

    def stop(self) -> None:
        """End the line, with the last row on it. May be called again."""
        if self._live:
            self._live.stop()
        elif self._pending:
            self._print(self._pending)
            self._pending = ""

    def _left_s(self, step: int, now: float) -> float | None:
        # Counted from the first row on: the step before it paid for start-up and compilation.
        if self._first is None:
            self._first = step, now
        first_step, first_time = self._first
        if step == first_step:
            return None
        return (now - first_time) / (step - first_step) * (self._total - step)

    def _print(self, line: str) -> None:
        self._console.print(Text(line), soft_wrap=True)


def format_row(row: Row, val_loss: float | None, left_s: float | None) -> str:
    """A row as `loss 6.123  val 6.482  34.5k tok/s  1.2 GiB  1:23 left`, without what is undefined."""
    parts = [f"loss {loss_text(row['train/loss'])}"]
    if val_loss is not None:
        parts.append(f"val {loss_text(val_loss)}")
    if row["perf/tokens_per_second"] is not None:
        parts.append(f"{count_text(row['perf/tokens_per_second'])} tok/s")
    if row["memory/peak_bytes"] is not None:
        parts.append(bytes_text(row["memory/peak_bytes"]))
    if left_s:
        parts.append(f"{duration_text(left_s)} left")
    return "  ".join(parts)


STOPPED_STATUSES = ("preempted", "interrupted")
NO_MINIMUM_NOTE = " (train.loss=sum: the sum of all outputs, which has no targets and no minimum, so it decreases without bound)"


def report(
    console: Console,
    summary: Mapping[str, Any],
    run_dir: Path,
    wandb_line: str | None,
    loss: Loss = Loss.next_token,
    next_steps: NextSteps | None = None,
) -> None:
    """The report at the end of a run: results, files, and commands to try next.

    Args:
        wandb_line: the run's page or the command that uploads it; None without W&B.
    """
    title = Text(f"{summary['run_name']}: {summary['status']}")
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in _results(summary, loss):
        table.add_row(name, Text(value))
    console.print()
    console.print(table)
    lines: list[Text] = []
    if summary["status"] in STOPPED_STATUSES and next_steps:
        resume = next_steps.to_resume(run_dir)
        lines.append(Text(f"{summary['error']} after step {summary['steps']}; to resume: {resume}"))
    else:
        lines += [Text(f"error  {summary['error']}", style="red")] if summary.get("error") else []
        lines.append(Text(f"run    {path_text(run_dir)}"))
    lines += [Text(f"W&B    {wandb_line}")] if wandb_line else []
    if summary["status"] == "completed" and next_steps:
        hints = next_steps.after(summary, run_dir)
        lines += [Text("next"), *(Text(f"  {command}  # {why}") for command, why in hints)]
    for line in lines:
        console.print(line, soft_wrap=True)


def _results(summary: Mapping[str, Any], loss: Loss) -> list[tuple[str, str]]:
    tokens, ranks = count_text(summary["tokens"]), summary["world_size"]
    entropy = summary.get("unigram_entropy")
    beside = "" if entropy is None else f" (unigram entropy {loss_text(entropy)})"
    speed, mfu = summary["perf/tokens_per_second"], summary["perf/mfu"]
    in_float8 = summary.get("float8", "none") != "none"
    peak = ", relative to the bfloat16 peak though in float8" if in_float8 else ""
    skipped = summary.get("train/skipped_updates")
    sent = summary["comm/bytes_per_step"], summary.get("comm/bytes_per_step_by_axis")
    too_short = f"{UNDEFINED} (no step after train.warmup_log_steps)"
    rows = [
        ("steps", f"{summary['steps']} ({tokens} tokens, {ranks} rank{'s' if ranks > 1 else ''})"),
        ("skipped updates", f"{skipped}, with gradient norms that are not finite" if skipped else ""),
        ("final loss", loss_text(summary["train/loss"]) + (NO_MINIMUM_NOTE if loss is Loss.sum else "")),
        ("held-out loss", loss_text(summary["val/loss"]) + beside),
        ("speed", too_short if speed is None else f"{count_text(speed)} tok/s"),
        ("MFU", "" if mfu is None else f"{share_text(mfu)} (6N + 12Lhs{peak})"),
        ("peak memory", bytes_text(summary["memory/peak_bytes"])),
        ("communication per step (rank 0)", _total_and_parts(*sent)),
        ("memory by kind (rank 0)", _total_and_parts(None, summary.get("memory/held_bytes"))),
    ]
    return [(name, text) for name, text in rows if text]


def _total_and_parts(total: float | None, parts: Mapping[str, float] | None) -> str:
    """`23.9 MiB: dp_shard 11.8 MiB, tp 12.1 MiB`"""
    listed = ", ".join(f"{name} {bytes_text(value)}" for name, value in (parts or {}).items())
    return listed if total is None else bytes_text(total) + (f": {listed}" if listed else "")
