"""Commands are run as a user runs them: in a process of their own, in an empty folder."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROGRAM = Path(__file__).with_name("program.py")
NOT_OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "TORCHELASTIC_", "SLURM_")


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str
    cpu_seconds: float
    """What it computed, all of its processes together: a busy machine makes it wait, but not compute, longer."""

    @property
    def refusals(self) -> list[str]:
        """The lines that a refused config is allowed one of."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]

    @property
    def folders(self) -> list[str]:
        """The run folder as each rank saw it."""
        return [line.split()[1] for line in self.out.splitlines() if line.startswith("folder ")]

    @property
    def records(self) -> list[str]:
        """Where each rank writes Hydra's record of the config, "None" for one that does not."""
        return sorted(line.split()[2] for line in self.out.splitlines() if line.startswith("folder "))


Command = Callable[..., Done]


def environment(**more: str) -> dict[str, str]:
    """One thread, and nothing of a job that the tests themselves may be part of."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith(NOT_OURS)}
    return {**outside, "OMP_NUM_THREADS": "1", **more}


def run_command(command: list[str], cwd: Path, env: dict[str, str]) -> Done:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        command,
        cwd=cwd,
        env=environment(**env),
        capture_output=True,
        text=True,
        timeout=120,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Done(process.returncode, process.stdout, process.stderr, cpu_seconds)
