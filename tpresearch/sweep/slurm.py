"""Jobs of a sweep as Slurm's, through submitit: one task per node, each running the same elastic agent.

sweep -> one submission for each shape of resources, an array where several jobs have it
      -> on each node `NodeAgent` -> torch.distributed.run, rendezvous (c10d) on the job's first host -> the ranks
"""

from __future__ import annotations

import math
import os
import signal
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from subprocess import Popen
from typing import TYPE_CHECKING, Any

from tpresearch.agent import SAVE_TIME_S
from tpresearch.config.errors import ConfigError, one_line
from tpresearch.config.schema import SlurmConfig
from tpresearch.sweep.job import CONSOLE_LOG, STOPPED_CODE, Job
from tpresearch.sweep.launcher import TorchrunLauncher
from tpresearch.sweep.running import (
    Devices,
    StartJob,
    job_environment,
    kill_processes,
    set_aside,
    start_process,
)

if TYPE_CHECKING:
    import submitit
    from submitit.helpers import DelayedSubmission

SIGNAL_BEFORE_LIMIT_S = SAVE_TIME_S + 60
"""Seconds before the time limit at which a run is told to save and stop: the agent must end in time, or nothing is requeued."""
MAX_TIMEOUTS = 1000
"""Number of time limits that a job may reach and resume after."""


@dataclass(frozen=True)
class NodeAgent:
    """What runs on each node of a job; its return value is the exit code of that node's agent."""

    arguments: list[str]
    ranks_per_node: int
    folder: Path
    threads: int = 1
    """Threads per rank, unless OMP_NUM_THREADS is set."""
    running: list[Popen[bytes]] = field(default_factory=list)
    """The running agent, if there is one."""

    def __call__(self) -> int:
        from submitit import JobEnvironment

        node = JobEnvironment()
        # Left by the start before a requeue, if another node was signalled first and ended this one.
        node.paths.result_pickle.unlink(missing_ok=True)
        log_name = CONSOLE_LOG if node.node == 0 else f"console-node{node.node}.log"
        command = [sys.executable, *self._agent(node), *self.arguments]
        env = {"OMP_NUM_THREADS": str(self.threads), **job_environment(self.folder)}
        with (self.folder / log_name).open("a") as log:
            process = start_process(command, env, log)
        self.running.append(process)
        if node.cluster == "local":  # Slurm signals all processes of a job, this stand-in for it one alone
            signal.signal(signal.SIGTERM, lambda *_: process.terminate())
        try:
            return process.wait()
        finally:  # submitit raises here where the job is not to be started again, so that the run closes what it has open
            process.terminate()
            process.wait()

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit shortly before the time limit and before preemption; returns what Slurm requeues: the same job,
        which resumes from what it saves now. The ranks of other nodes stop with those of this one."""
        from submitit.helpers import DelayedSubmission

        for process in self.running:
            process.terminate()
            # Without reaping it: the signal has come while it was waited for.
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        return DelayedSubmission(replace(self, running=[]))

    def _agent(self, node: submitit.JobEnvironment) -> list[str]:
        agent = ["-m", "torch.distributed.run", f"--nproc-per-node={self.ranks_per_node}"]
        if node.num_nodes > 1:
            # Jobs may share a node. Ports from 32768 are what Linux gives to outgoing connections.
            port = 20000 + zlib.crc32(node.job_id.encode()) % 12000
            meeting = [f"--rdzv-endpoint={node.hostnames[0]}:{port}", f"--rdzv-id={node.job_id}"]
            return [*agent, f"--nnodes={node.num_nodes}", "--rdzv-backend=c10d", *meeting]
        return [*agent, "--standalone"] if self.ranks_per_node > 1 else []


class SlurmJob:
    def __init__(self, job: Job, handle: submitit.Job[int]) -> None:
        self._job, self._handle = job, handle
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None and self._handle.done():
            self._code = self._exit_code()
        return self._code

    def _exit_code(self) -> int:
        from submitit.core.utils import FailedJobError, UncompletedJobError

        try:
            return next((code for code in self._handle.results() if code), 0)
        except (FailedJobError, UncompletedJobError):
            how = f"SlurmError: job {self._handle.job_id} ended as {self._handle.state} without a result"
            with (self._job.folder / CONSOLE_LOG).open("a") as log:
                log.write(f"{how}; see {self._handle.paths.stderr}\n")
            return 1

    def terminate(self) -> None:
        self._handle.cancel(check=False)

    def kill(self) -> None:
        """Slurm has ended or will end it by itself; its local stand-in may leave ranks behind."""
        if self._code is None:
            self._code = STOPPED_CODE
        kill_processes(self._job.folder)


class SlurmLauncher(TorchrunLauncher):
    """As TorchrunLauncher, on a Slurm cluster. Its arguments are those of `SlurmConfig`."""

    def __init__(self, start: StartJob | None = None, **settings: Any) -> None:
        self.settings = SlurmConfig(**settings)
        super().__init__(start, fail_fast=self.settings.fail_fast, objective=self.settings.objective)
        self.submitted: dict[int, SlurmJob] = {}
        self.ranks_per_node = self.settings.ranks_per_node

    def check(self) -> None:
        try:
            from submitit.slurm.slurm import SlurmExecutor
        except ModuleNotFoundError:
            why, legal = "needs submitit, which is not installed", "pip install 'tpresearch[slurm]'"
            raise ConfigError("hydra/launcher", "slurm", why, legal, fix={"hydra/launcher": None}) from None
        if self.settings.cluster == "slurm" and SlurmExecutor.affinity() <= 0:
            why = "there is no srun on this machine"
            legal = "a machine that submits to Slurm, or hydra.launcher.cluster=local"
            raise ConfigError("hydra/launcher", "slurm", why, legal, fix={"hydra/launcher": None})

    def allocate(self, jobs: Sequence[Job], gpus: list[str]) -> tuple[Devices, StartJob]:
        """Submit all jobs at once: Slurm has the queue."""
        self.submitted = {}
        submit(jobs, self.settings, self._folder / "slurm", self.submitted)
        return Devices([], sum(job.slots for job in jobs)), lambda job, share: self.submitted[job.number]

    def cancel(self) -> None:
        for job in self.submitted.values():
            if job.poll() is None:
                job.terminate()
                job.kill()


def submit(jobs: Sequence[Job], settings: SlurmConfig, folder: Path, submitted: dict[int, SlurmJob]) -> None:
    """Submit all jobs to Slurm, those of one shape together as an array; refused if Slurm refuses a shape.

    Args:
        submitted: filled with each job by its number, as soon as Slurm has it.
    """
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    shapes: dict[tuple[int, int, int], list[Job]] = {}
    """By nodes, ranks per node, and GPUs (or CPU slots) per node."""
    for job in jobs:
        set_aside(job)
        job.folder.mkdir(parents=True, exist_ok=True)
        shape = job.nodes, job.ranks // job.nodes, math.ceil(job.slots / job.nodes)
        shapes.setdefault(shape, []).append(job)
    for (nodes, ranks, slots), alike in shapes.items():
        executor = submitit.AutoExecutor(
            folder / "%j", cluster=str(settings.cluster), slurm_max_num_timeout=MAX_TIMEOUTS
        )
        executor.update_parameters(**submitit_parameters(settings, nodes, slots))
        threads = max(1, settings.cpus_per_slot * slots // ranks)
        agents = [NodeAgent(job.arguments, ranks, job.folder.absolute(), threads) for job in alike]
        try:
            with _outside_of_own_job(), executor.batch():
                handles = [executor.submit(agent) for agent in agents]
        except (FailedJobError, FailedSubmissionError) as error:
            why = f"sbatch refuses {nodes} node{'s' if nodes > 1 else ''}: {one_line(error)}"
            legal = "what this cluster takes; the options are in conf/hydra/launcher/slurm.yaml"
            raise ConfigError("hydra/launcher", "slurm", why, legal) from None
        for job, handle in zip(alike, handles, strict=True):
            submitted[job.number] = SlurmJob(job, handle)


@contextmanager
def _outside_of_own_job() -> Iterator[None]:
    """Without the variables of the job that this process runs in, if it does: sbatch would pass them on, such as the cores that ranks
    are bound to, or the number of an array."""
    before = dict(os.environ)
    for name in before if before.get("SLURM_JOB_ID") else ():
        if name.startswith(("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")) and name != "SLURM_CONF":
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def submitit_parameters(settings: SlurmConfig, nodes: int, slots: int) -> dict[str, Any]:
    cpus = settings.cpus_per_slot * slots
    return {
        "name": settings.job_name,
        "nodes": nodes,
        "tasks_per_node": 1,
        "timeout_min": settings.timeout_min,
        "cpus_per_task": cpus,
        "slurm_srun_args": [f"--cpus-per-task={cpus}"],  # srun does not take it from sbatch since Slurm 22.05
        "gpus_per_node": slots if settings.gpus else None,
        "mem_gb": settings.mem_gb,
        "stderr_to_stdout": True,
        "slurm_signal_delay_s": SIGNAL_BEFORE_LIMIT_S,
        **{f"slurm_{key}": getattr(settings, key) for key in ("partition", "account", "qos", "constraint")},
        "slurm_array_parallelism": settings.jobs_at_once,
        "slurm_setup": list(settings.setup) or None,
        "slurm_additional_parameters": dict(settings.sbatch) or None,
    }
