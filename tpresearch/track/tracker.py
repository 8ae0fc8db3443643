"""Tracking of one run, on rank 0: each row to the record, W&B and the terminal; the summary when it ends."""

from __future__ import annotations

import io
import json
import logging
import signal
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self, SupportsFloat

from rich.console import Console

from tpresearch.config import Config, ConfigError
from tpresearch.config.compose import as_dict
from tpresearch.config.errors import first_line
from tpresearch.config.secrets import refuse_secrets
from tpresearch.launch.stop import Stopped
from tpresearch.ledger.entries import StepLedger
from tpresearch.track import record
from tpresearch.track.console import ProgressLine, report
from tpresearch.track.metrics_file import MetricsFile
from tpresearch.track.names import Row, step_of
from tpresearch.track.next_steps import NextSteps
from tpresearch.track.tensorboard import TensorboardRun
from tpresearch.track.text import run_name
from tpresearch.track.wandb_run import WandbRun

log = logging.getLogger(__name__)

Status = Literal["completed", "failed", "preempted", "interrupted"]
EXIT_CODES: dict[Status, int] = {
    "completed": 0,
    "failed": 1,
    "preempted": 128 + signal.SIGTERM,
    "interrupted": 128 + signal.SIGINT,
}


@dataclass(frozen=True)
class RunFacts:
    """Facts about a run that go into its summary, known once its ranks and data exist."""

    world_size: int
    mesh: dict[str, int]
    """Ranks along each axis."""
    parameters: int
    """Of the whole model, over all ranks."""
    device: str
    """`cpu`, or the accelerator's name."""
    corpus_hash: str | None = None
    """Losses are never compared between different hashes."""
    unigram_entropy: float | None = None
    """Nats per token of the held-out rows, when only the tokens' frequencies are known."""
    tokenizer_hash: str | None = None
    initial_weights: str | None = None
    """Hash of those that `init_from` names."""
    held_out_rows: int | None = None
    """How many rows `val/loss` is of."""


class Tracker:
    """Tracks a run from its first row to its summary. For rank 0 alone.

        with Tracker(cfg, run_dir, facts, total_steps) as tracker:
            ...
            tracker.log({"train/step": 1, "train/tokens": 3072, "train/loss": 8.31, ...})

    The block's end completes the run; an exception in it makes it failed, Ctrl-C interrupted, another signal
    preempted, and propagates. Call `finish` before that to set another status. What is written at the end is tried at the
    start, and the summary survives a full disk, a removed folder and a report that cannot be printed.

    A config that holds a credential is refused.

    Args:
        run_dir: the run's folder. One that has been tracked before is continued, in W&B too.
        total_steps: the step at which the run ends.
        start_step: the step from which this process starts: see `resume_from`.
        plan: the compiled plan as it was printed, for plan.txt.
        next_steps: commands that the report suggests.
        console: where the progress and the report go; standard output by default.
    """

    def __init__(
        self,
        cfg: Config,
        run_dir: Path,
        facts: RunFacts,
        total_steps: int,
        *,
        start_step: int = 0,
        plan: str | None = None,
        next_steps: NextSteps | None = None,
        console: Console | None = None,
    ) -> None:
        refuse_secrets(as_dict(cfg))
        self.name = cfg.logger.name or run_name(cfg, facts.mesh)
        self._cfg, self._run_dir, self.facts, self._plan = cfg, run_dir, facts, plan
        self._console = console or Console(highlight=False)
        self._began, self._total_steps = time.monotonic(), total_steps
        self._ended, self._may_be_refused, self._next_steps = False, start_step > 0, next_steps
        self._last_row: Row | None = None
        self._step_ledger: StepLedger | None = None
        run_dir.mkdir(parents=True, exist_ok=True)
        self._start_step = self._last_step = start_step
        if not self._may_be_refused:
            self._start_from(0)
        self._metrics = MetricsFile(run_dir)
        self._wandb = WandbRun.start(cfg, run_dir, self.name, facts.device) if cfg.logger.wandb else None
        self._report(Console(file=io.StringIO()), self._summary("completed", None), None)
        self._tensorboard = TensorboardRun(run_dir) if cfg.logger.tensorboard else None
        self._progress = ProgressLine(self._console, total_steps, start_step)

    def _start_from(self, step: int) -> None:
        """Record from which step on these settings apply."""
        self._start_step = self._last_step = step
        record.write_config(self._run_dir, as_dict(self._cfg), step)
        if self._plan is not None:
            record.write_plan(self._run_dir, self._plan, step)

    def resume_from(self, step: int) -> None:
        """Before the first row: continue after this step, that of the checkpoint that was loaded, which may be older than the newest.
        Discards rows of later steps, and the summary, which was of an earlier end."""
        self._start_from(step)
        self._may_be_refused = False
        (self._run_dir / record.SUMMARY_FILE).unlink(missing_ok=True)
        self._metrics.truncate_after(step)
        logged = record.read_metrics(self._run_dir)
        if step and (not logged or step_of(logged[-1]) < step):  # a checkpoint follows the row of its step
            since = step_of(logged[-1]) if logged else 0
            log.warning("metrics.jsonl has lost the rows of steps %d to %d", since + 1, step)
        if self._wandb:
            for row in logged:
                self._wandb.log(row)
        if step:
            ran_on = {"world_size": self.facts.world_size, "mesh": self.facts.mesh}
            record.record_resumption(self._run_dir, {"step": step, **ran_on})

    def lacks_held_out_loss(self) -> bool:
        """Whether the row of the step that the run resumes from has none, as where a signal stopped its evaluation."""
        logged = record.read_metrics(self._run_dir)
        return bool(logged) and step_of(logged[-1]) == self._start_step and logged[-1]["val/loss"] is None

    def add_held_out_loss(self, loss: float) -> None:
        """Complete that row."""
        row = self._metrics.complete_last_row({"val/loss": loss})
        if self._wandb:
            self._wandb.log_more({name: row[name] for name in ("train/step", "train/tokens", "val/loss")})
        if self._tensorboard:
            self._tensorboard.log(row, self._start_step)
        self._progress.show(row)

    def log(self, values: Mapping[str, SupportsFloat | None]) -> None:
        """Record one step, as by `complete_row`."""
        row = self._last_row = self._metrics.append(values)
        self._last_step = step_of(row)
        if self._wandb:
            self._wandb.log(row)
        if self._tensorboard:
            self._tensorboard.log(row, self._start_step)
        self._progress.show(row)

    def record_ledger(self, step: StepLedger) -> None:
        """Record what one step sent and held: ledger.json, and its sums in the summary."""
        self._step_ledger = step
        try:
            record.write_ledger(self._run_dir, step.as_json())
        except OSError as problem:
            log.warning("ledger.json cannot be written: %s", problem.strerror)

    def finish(self, status: Status = "completed", error: str | None = None) -> None:
        """Write summary.json, close W&B and print the report. Only the first call counts. `error` is why it did not complete."""
        if self._ended:
            return
        self._close()
        summary = self._summary(status, error)
        try:
            if self._may_be_refused:  # it has failed before that was known
                self._start_from(self._start_step)
            record.write_summary(self._run_dir, summary)
        except OSError as problem:
            said = json.dumps(summary)
            log.error("summary.json cannot be written (%s); it is %s", problem.strerror, said)
        finally:
            if self._wandb:
                self._finish_wandb(self._wandb, summary, status)
        try:
            self._report(self._console, summary, self._next_steps)
        except Exception as problem:
            log.warning("the report cannot be shown: %s", _error_line(problem))

    def _finish_wandb(self, wandb: WandbRun, summary: Mapping[str, Any], status: Status) -> None:
        """Close the run there. Offline, a client writes nothing more once the disk was full: another one then logs what it lacks."""
        wandb.finish(summary, EXIT_CODES[status], preempted=status == "preempted")
        if self._metrics.waited and wandb.url is None:
            self._wandb = WandbRun.start(self._cfg, self._run_dir, self.name, self.facts.device)
            if self._wandb:
                for row in record.read_metrics(self._run_dir):
                    self._wandb.log(row)
                self._wandb.finish(summary, EXIT_CODES[status], preempted=status == "preempted")

    def _end_silently(self) -> None:
        """Close without a summary: resuming was refused, and the record stays unchanged."""
        self._close()
        if self._wandb:
            self._wandb.finish({}, EXIT_CODES["failed"])

    def _close(self) -> None:
        self._ended = True
        self._progress.stop()
        if problem := self._metrics.close():
            log.warning("metrics.jsonl lacks rows: %s", problem)
        if self._tensorboard:
            self._tensorboard.close()

    def _report(self, console: Console, summary: Mapping[str, Any], next_steps: NextSteps | None) -> None:
        where = self._wandb.page_or_sync_command() if self._wandb else None
        report(console, summary, self._run_dir, where, self._cfg.train.loss, next_steps)

    def _summary(self, status: Status, error: str | None) -> dict[str, Any]:
        cfg = self._cfg
        logged = record.read_metrics(self._run_dir)
        if self._last_row and (not logged or step_of(logged[-1]) < step_of(self._last_row)):
            logged.append(self._last_row)  # for which the disk had no room
        rows = [row for row in logged if step_of(row) <= self._last_step]
        start = record.measured_from(self._run_dir, self._start_step, self._total_steps)
        ledger = self._step_ledger if start == self._start_step else _ledger_of(self._run_dir)
        summary = {
            "status": status,
            **({"error": error} if error else {}),
            "run_name": self.name,
            "steps": self._last_step,
            "tokens": rows[-1]["train/tokens"] if rows else 0,
            "model": cfg.model.name,
            "parallel": cfg.parallel.name,
            **asdict(self.facts),
            "dtype": str(cfg.train.dtype),
            "weights": str(cfg.train.weight_dtype),
            "moments": str(cfg.optimizer.moment_dtype or cfg.train.weight_dtype),
            "float8": str(cfg.train.float8),
            **record.summary_figures(rows, cfg.train.warmup_log_steps, start),
            **(ledger.summary() if ledger else {}),
            **({"resumed": resumed} if (resumed := record.read_resumptions(self._run_dir)) else {}),
            "wall_time_s": time.monotonic() - self._began,
        }
        return record.without_nonfinite(summary)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.finish()
        elif isinstance(error, ConfigError) and self._may_be_refused:
            self._end_silently()
        else:
            self.finish(_status(error), _error_line(error))


def _ledger_of(run_dir: Path) -> StepLedger | None:
    try:
        return StepLedger.from_json(record.read_record(run_dir / record.LEDGER_FILE))
    except (OSError, ValueError, KeyError, TypeError):  # without it, a run has no such figures
        return None


def _status(error: BaseException) -> Status:
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, Stopped) and error.number == signal.SIGINT):
        return "interrupted"
    return "preempted" if isinstance(error, Stopped) else "failed"


def _error_line(error: BaseException) -> str:
    """`ValueError: its message`, on one line."""
    kind, first = type(error).__name__, first_line(error)
    return first if isinstance(error, Stopped) or first == kind else f"{kind}: {first}"
