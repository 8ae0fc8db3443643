"""The Hydra launcher of `-m`: plan all jobs, run those that are not done, and report the results."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from tpresearch.config.errors import JobFailed, refuse_unwritable
from tpresearch.config.schema import TorchrunConfig
from tpresearch.config.world import usable_cores
from tpresearch.launch.claim import lock_folder
from tpresearch.sweep.job import Job, will_resume
from tpresearch.sweep.outcome import Outcome, outcome_of
from tpresearch.sweep.planning import JobPlanner, assign_folders
from tpresearch.sweep.running import (
    Devices,
    JobProcess,
    StartJob,
    collect_signals,
    run_jobs,
    wait_for_earlier_job,
)
from tpresearch.track.text import duration_text

if TYPE_CHECKING:
    from tpresearch.launch.entrypoint import Program


class TorchrunLauncher(Launcher):
    """Starts each job of a sweep under its own elastic agent, with the ranks that its mesh needs. Its settings are those of
    `TorchrunConfig`; a test replaces `start`, which starts one job.
    """

    ranks_per_node: int | None = None
    """Maximum ranks per host of the cluster that jobs run on; None if they run here."""

    def __init__(self, start: StartJob | None = None, **settings: Any) -> None:
        self._settings, self._start = TorchrunConfig(**settings), start
        self._outcomes: dict[int, Outcome] = {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._loader, self._config = hydra_context.config_loader, config
        self._preflight = cast("Program[Any]", task_function).run_preflight
        self._folder = Path(config.hydra.sweep.dir)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run a batch of jobs; a sweeper that chooses the next ones from these results calls it again. Refuses the first job that
        cannot run, before any has started.

        Raises:
            SystemExit: after Ctrl-C, SIGTERM or SIGHUP, once all ranks have ended and the table is printed.
        """
        self.check()
        gpus = _visible_gpus()
        planner = JobPlanner(self._loader, self._config, self._preflight, len(gpus), self.ranks_per_node)
        jobs = planner.plan(job_overrides, initial_job_idx)
        # Other sweeps would mistake this one's jobs for earlier ones.
        with refuse_unwritable(key := "hydra.sweep.dir", self._folder):
            lock = lock_folder(self._folder, key=key)
        with lock:
            return self._run(list(assign_folders(jobs, self._folder)), gpus)

    def _run(self, jobs: list[Job], gpus: list[str]) -> Sequence[JobReturn]:
        # Late, like everything that prints: Hydra imports this file at the start of every command.
        from rich.console import Console

        from tpresearch.sweep.status import LiveStatus

        self._outcomes |= {job.number: outcome_of(job, None) for job in jobs}
        began: dict[int, float] = {}

        def on_start(job: Job) -> None:
            began[job.number] = time.monotonic()
            ranks = f"{job.ranks} rank{'s' if job.ranks > 1 else ''}"
            begins = "resumes" if will_resume(job) else "starts"
            said = f"job {job.number} {begins} on {ranks}: {' '.join(job.overrides)}"
            self._print("\n  ".join([said, str(job.folder), *job.notes]))

        def on_end(job: Job, code: int) -> None:
            seconds = time.monotonic() - began[job.number]
            outcome = self._outcomes[job.number] = outcome_of(job, code, seconds)
            why = f": {outcome.error}" if outcome.error else ""
            trained = outcome.summary.get("wall_time_s")
            of_it = f", {duration_text(trained)} of it training" if isinstance(trained, int | float) else ""
            self._print(f"job {job.number} {outcome.status} after {duration_text(seconds)}{of_it}{why}")

        numbers: dict[str, int] = {}
        for job in jobs:
            first = numbers.setdefault(job.signature, job.number)
            if job.completed:
                self._print(f"job {job.number} was completed earlier: {job.folder}")
            elif first != job.number:
                self._print(f"job {job.number} repeats job {first}: their configs are the same")
        todo = [job for job in jobs if not job.completed]
        for job in todo:
            wait_for_earlier_job(job.folder, self._print)
        with collect_signals() as received, LiveStatus(Console(highlight=False)) as status:
            try:
                devices, start = self.allocate(todo, gpus)
                start = self._start or start
                fail_fast = self._settings.fail_fast
                run_jobs(todo, devices, start, on_start, on_end, fail_fast, received, status.show)
            finally:
                self.cancel()
        self._report()
        if received:
            sys.exit(128 + received[0])
        return [self._job_return(self._outcomes[job.number]) for job in jobs]

    def check(self) -> None:
        """Refuse a machine that cannot start jobs in this way."""

    def allocate(self, jobs: Sequence[Job], gpus: list[str]) -> tuple[Devices, StartJob]:
        """The devices that jobs run on, and how to start a job."""
        slots = self._settings.cpu_slots
        if slots is None and all(job.simulates for job in jobs):
            slots = usable_cores()
        return Devices(gpus, slots), JobProcess

    def cancel(self) -> None:
        """End what `allocate` started and nothing waits for."""

    def _print(self, line: str) -> None:
        with suppress(OSError):  # the terminal may be gone
            print(line, flush=True)

    def _report(self) -> None:
        from rich.console import Console

        from tpresearch.sweep.table import print_table, write_files

        outcomes = [self._outcomes[number] for number in sorted(self._outcomes)]
        try:
            write_files(self._folder, outcomes)
        except OSError as error:  # a full disk, say: the terminal has the table all the same
            self._print(f"summary.csv and summary.md could not be written: {error}")
        width = None if sys.stdout.isatty() else 220
        with suppress(OSError):
            print_table(Console(highlight=False, width=width), self._folder, outcomes)

    def _job_return(self, outcome: Outcome) -> JobReturn:
        job, objective, error = outcome.job, self._settings.objective, None
        value = outcome.summary.get(objective)
        if outcome.status != "completed":
            error = f"job {job.number}: {outcome.error or outcome.status}"
        elif outcome.summary and not isinstance(value, int | float):
            error = f"job {job.number}: summary.json has no number for hydra.launcher.objective={objective}"
            self._print(error)
        returned = QuietReturn(overrides=job.overrides, cfg=job.composed)
        returned.status = JobStatus.FAILED if error else JobStatus.COMPLETED
        returned.return_value = JobFailed(error) if error else value
        return returned


class QuietReturn(JobReturn):
    """A JobReturn that does not print: the table states what failed."""

    @property
    def return_value(self) -> object:
        if self.status is JobStatus.FAILED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: object) -> None:
        self._return_value = value


def _visible_gpus() -> list[str]:
    """The GPUs that this sweep may use, as CUDA_VISIBLE_DEVICES names them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible == "":
        return []
    import torch  # late: it takes seconds

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [name for name in (visible or "").split(",") if name]
    return named[:count] if named else [str(index) for index in range(count)]
