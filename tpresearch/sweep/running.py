"""Runs jobs in parallel, as many as the devices allow, each under its own agent process.

An agent in a process, rather than torch's `launch_agent` in this one, can run beside another and be stopped
as a whole: the agent handles signals in a main thread only, and blocks it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from subprocess import DEVNULL, STDOUT, Popen
from typing import Any, Protocol, TextIO

from tpresearch.agent import SAVE_TIME_S
from tpresearch.config.errors import ConfigError
from tpresearch.launch.claim import EARLIER_SUFFIX, free_name, lock_folder
from tpresearch.launch.stop import end_with_parent
from tpresearch.sweep.job import CONSOLE_LOG, STOPPED_CODE, Job, will_resume

POLL_S = 0.1
GRACE_S = SAVE_TIME_S + 30
"""Time for a stopped job to end; torchrun kills its ranks before that, if they do not."""
JOB_VARIABLE = "TPRESEARCH_SWEEP_JOB"
"""Environment variable of all processes of a job, with its folder: ranks are in sessions of their own, not in their
agent's process group."""


class RunningJob(Protocol):
    def poll(self) -> int | None: ...
    def terminate(self) -> None:
        """Ask all its processes to end, and return at once."""

    def kill(self) -> None:
        """End what is left of it."""


StartJob = Callable[[Job, "DeviceShare"], RunningJob]
"""Begins one job on its share of this machine."""


@dataclass
class Devices:
    """The devices that jobs can run on: GPUs by their names in CUDA_VISIBLE_DEVICES, and slots for ranks on CPUs."""

    gpus: list[str]
    cpu_slots: int | None = None
    """None runs one job after another."""
    _cpu_taken: int = field(default=0, init=False)

    def acquire(self, job: Job) -> DeviceShare | None:
        """A share for this job, or None while others take too much."""
        if job.gpus:
            if job.slots > len(self.gpus):
                return None
            share = DeviceShare(self.gpus[: job.slots], 0)
            self.gpus = self.gpus[job.slots :]
            return share
        total = self.cpu_slots or 1
        wanted = min(job.slots, total)
        if self._cpu_taken + wanted > total:
            return None
        self._cpu_taken += wanted
        return DeviceShare([], wanted)

    def release(self, share: DeviceShare) -> None:
        self.gpus = sorted(self.gpus + share.gpus, key=lambda name: (len(name), name))
        self._cpu_taken -= share.cpu_slots


@dataclass(frozen=True)
class DeviceShare:
    gpus: list[str]
    cpu_slots: int

    def environment(self) -> dict[str, str]:
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        return threads | ({"CUDA_VISIBLE_DEVICES": ",".join(self.gpus)} if self.gpus else {})


def local_command(job: Job) -> list[str]:
    """`python train.py ...` for one rank, `python -m torch.distributed.run ... train.py ...` for more."""
    agent = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.ranks}"]
    return [sys.executable, *(agent if job.ranks > 1 else []), *job.arguments]


def start_process(command: list[str], env: dict[str, str], log: TextIO, **how: Any) -> Popen[bytes]:
    """An agent or rank that ends with this process; what it prints goes to the log."""
    parent = os.getpid()

    def begin() -> None:
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm sends submitit's to all processes of a step
        end_with_parent(signal.SIGTERM, parent)

    return Popen(command, env=env, stdin=DEVNULL, stdout=log, stderr=STDOUT, preexec_fn=begin, **how)


class JobProcess:
    """A job's agent, or its only rank, in its own session; its output goes to `console.log`."""

    def __init__(self, job: Job, share: DeviceShare) -> None:
        set_aside(job)
        job.folder.mkdir(parents=True, exist_ok=True)
        self._folder = job.folder
        env = job_environment(job.folder) | share.environment()
        with (job.folder / CONSOLE_LOG).open("w") as log:
            self._process = start_process(local_command(job), env, log, start_new_session=True)

    def poll(self) -> int | None:
        return self._process.poll()

    def terminate(self) -> None:
        self._process.terminate()  # an agent passes it on to its ranks

    def kill(self) -> None:
        if self.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        kill_processes(self._folder)


def run_jobs(
    jobs: Sequence[Job],
    devices: Devices,
    start: StartJob,
    on_start: Callable[[Job], None],
    on_end: Callable[[Job, int], None],
    fail_fast: bool,
    received: Sequence[int],
    on_poll: Callable[[Sequence[Job]], None],
) -> None:
    """Run each job as soon as there is a share for it. No job is still running when this returns.

    Args:
        received: the signals so far that end a sweep, from `collect_signals`.
        on_poll: called repeatedly with the running jobs.
    """
    waiting = list(jobs)
    running: dict[int, tuple[Job, DeviceShare, RunningJob]] = {}
    try:
        while waiting or running:
            for job in list(waiting):
                if received or (share := devices.acquire(job)) is None:
                    continue
                waiting.remove(job)
                on_start(job)
                running[job.number] = (job, share, start(job, share))
            for number, (job, share, process) in list(running.items()):
                if (code := process.poll()) is None:
                    continue
                process.kill()
                del running[number]
                devices.release(share)
                on_end(job, code)
                if code and fail_fast:
                    return
            if received:
                return
            on_poll([job for job, _, _ in running.values()])
            time.sleep(POLL_S)
    finally:
        _stop_jobs([process for _, _, process in running.values()], received)
        for job, _, process in running.values():
            on_end(job, 0 if process.poll() == 0 else STOPPED_CODE)


def _stop_jobs(running: Sequence[RunningJob], received: Sequence[int]) -> None:
    """End these jobs: asked first, and killed after GRACE_S, or at a further Ctrl-C."""
    for process in running:
        process.terminate()
    asked, until = len(received), time.monotonic() + GRACE_S
    while any(process.poll() is None for process in running):
        if time.monotonic() > until or len(received) > asked:
            break
        time.sleep(POLL_S)
    for process in running:
        process.kill()


@contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Collects the signals that end a sweep, so that none arrives between a job's start and its registration.

    Signals that are ignored already stay ignored: under `nohup` a sweep outlives its terminal.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    all_ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    ends = [number for number in all_ends if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in ends}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def set_aside(job: Job) -> None:
    """Set aside what an earlier, unfinished start of this job left, so that the new record does not mix with it.

    A job that resumes needs its folder; only the record of how the earlier start ended is moved away then.
    """
    folder = job.folder
    if not folder.exists() or not any(folder.iterdir()):
        return
    if will_resume(job):
        for path in (folder / CONSOLE_LOG, folder / "summary.json"):
            with suppress(FileNotFoundError):
                path.rename(free_name(path, EARLIER_SUFFIX))
        return
    folder.rename(free_name(folder, EARLIER_SUFFIX))


def job_environment(folder: Path) -> dict[str, str]:
    """The environment of the job in this folder: this process's, without its own W&B run id."""
    own = {key: value for key, value in os.environ.items() if key != "WANDB_RUN_ID"}
    return {**own, JOB_VARIABLE: job_value(folder)}


def job_value(folder: Path) -> str:
    """The value of JOB_VARIABLE for the job in this folder."""
    return str(folder.resolve())


def processes_of(folder: Path) -> list[int]:
    """Ids of the processes on this machine of the job in this folder; none where there is no /proc."""
    found, mark = [], f"{JOB_VARIABLE}={job_value(folder)}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # it has ended, or is another user's
            if mark in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def kill_processes(folder: Path) -> None:
    for pid in processes_of(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def wait_for_earlier_job(folder: Path, say: Callable[[str], None]) -> None:
    """Wait for the job that an earlier start of the sweep left running in this folder: if that start was killed, it is ending. Refuses
    the folder if it does not end, or if a run that is not a job of a sweep uses it.
    """
    if left := processes_of(folder):
        runs = f"a job of an earlier launch is still running in {folder}, as process {left[0]}"
        say(f"{runs}: waiting for its end")
        until = time.monotonic() + GRACE_S
        while processes_of(folder):
            if time.monotonic() > until:
                legal = "wait for its end, or use another folder for this sweep"
                raise ConfigError("hydra.sweep.dir", folder.parent, runs, legal)
            time.sleep(POLL_S)
    if (folder / ".lock").is_file():
        with lock_folder(folder):
            pass
