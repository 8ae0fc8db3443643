"""`train.py` run as a user runs it, and what a run leaves, read back."""

from __future__ import annotations

import json
import os
import resource
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).parents[2] / "train.py"
TORCHRUN = Path(sys.executable).parent / "torchrun"
NOT_OURS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "SLURM_", "WANDB_", "HYDRA_")
TIMEOUT_S = 240
ROWS = ("parallel=fsdp", "train.steps=null", "train.tokens=600", "train.log_every=2", "train.eval_every=3")
"""A run of 600 tokens whose rows are not one a step."""


@dataclass(frozen=True)
class Done:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str
    cpu_seconds: float
    """Of all its processes: what it costs whatever else the machine does."""

    @property
    def refusal(self) -> str:
        """The one line that a refused config is allowed."""
        (line,) = [line for line in self.err.splitlines() if line.startswith("error: ")]
        return line

    @property
    def command_to_try(self) -> list[str]:
        """The command that the refusal ends with, in words."""
        return shlex.split(self.refusal.rpartition("; try: ")[2])


@dataclass(frozen=True)
class Trained:
    """A run that came to its end, and its folder."""

    done: Done
    folder: Path

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.rows]


def environment(home: Path, **more: str) -> dict[str, str]:
    """One thread, no GPU, no account, and nothing of a job that the tests themselves may be part of."""
    outside = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(NOT_OURS) and not key.lower().endswith("_proxy")
    }
    ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HOME": str(home)}
    return {**outside, **ours, **more}


def execute(command: list[str], cwd: Path, env: dict[str, str], timeout_s: float = TIMEOUT_S) -> Done:
    before = _children_s()
    ended = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s)
    return Done(ended.returncode, ended.stdout, ended.stderr, _children_s() - before)


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def train(ranks: int | None, folder: Path, home: Path, *overrides: str, **env: str) -> Done:
    """`torchrun --nproc-per-node=<ranks> train.py` with these overrides, or `python` for None; in `folder`."""
    starter = [str(TORCHRUN), "--standalone", f"--nproc-per-node={ranks}"] if ranks else [sys.executable]
    folder.mkdir(parents=True, exist_ok=True)
    return execute([*starter, str(TRAIN), *overrides], folder, environment(home, **env))


def on_path(folder: Path) -> dict[str, str]:
    """The environment in which modules in `folder` can be imported."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
