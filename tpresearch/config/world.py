"""Which process of how many this is, read from the environment before any process group exists."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class World:
    """This process's place in the job, as torchrun tells it; one process alone without torchrun."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    elastic: bool = False
    """Whether torchrun (or an elastic agent of our own) started this process."""
    here: bool = True
    """Whether the ranks run on this machine, so that its devices are theirs."""

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> World:
        if "RANK" not in env or "WORLD_SIZE" not in env:
            return cls()
        return cls(
            rank=int(env["RANK"]),
            size=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", 0)),
            local_size=int(env.get("LOCAL_WORLD_SIZE", 1)),
            elastic="TORCHELASTIC_RUN_ID" in env,
        )

    @property
    def hosts(self) -> int:
        return self.size // self.local_size


def slurm_tasks(env: Mapping[str, str] = os.environ) -> int:
    """Tasks that `srun` started of this same command, without torchrun between them; else 1.

    Only a step sets SLURM_STEP_NUM_TASKS: the batch script itself and an `salloc` shell count as one task.
    """
    return 1 if "WORLD_SIZE" in env else int(env.get("SLURM_STEP_NUM_TASKS", 1))
