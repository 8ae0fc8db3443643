"""Once imported, the jobs of a sweep on this machine are forks of a warm server, as the sweep itself is."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from support.commands import forked
from tpresearch.sweep import launcher
from tpresearch.sweep.job import CONSOLE_LOG, Job
from tpresearch.sweep.running import DeviceShare, JobProcess, job_environment, set_aside
from tpresearch.verify.ranks import Ranks

THREADS = ThreadPoolExecutor()


class ForkedJob(JobProcess):
    """What `JobProcess` is, but that it runs to its end: a sweep that is stopped needs processes of its own."""

    def __init__(self, job: Job, share: DeviceShare) -> None:
        set_aside(job)
        job.folder.mkdir(parents=True, exist_ok=True)
        log = job.folder / CONSOLE_LOG
        log.touch()
        size = job.ranks if job.ranks > 1 else None
        env = job_environment(job.folder) | share.environment()
        command = Ranks(), size, job.arguments, Path(os.getcwd()), env, str(log), str(log)
        self._ended: Future[tuple[int, float]] = THREADS.submit(forked, *command)

    def poll(self) -> int | None:
        return self._ended.result()[0] if self._ended.done() else None

    def terminate(self) -> None:
        raise NotImplementedError

    def kill(self) -> None:
        assert self._ended.done()


launcher.JobProcess = ForkedJob
