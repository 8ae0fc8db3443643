"""Rank and world size from the launcher's environment, read before any process group exists."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tpresearch.config.errors import ConfigError

RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
MASTER_VARIABLES = ("MASTER_ADDR", "MASTER_PORT")
RUN_ID = "TORCHELASTIC_RUN_ID"
"""Set by torchrun for each rank."""
OWN_DEVICE = "PET_VIRTUAL_LOCAL_RANK"
"""torchrun's variable for its option --virtual-local-rank; `tpresearch.agent` sets it for the ranks where the option is typed."""
PORTS = range(1 << 16)
LEGAL = "what torchrun or srun sets, or none of it for a process by itself"


class WrongEnvironment(ConfigError):
    """A variable with an impossible value, such as one of a launcher's that contradicts the others; the remedy is to
    unset all of `given`."""

    def __init__(self, name: str, value: object, why: str, given: Iterable[str], legal: str = LEGAL) -> None:
        super().__init__(name, value, why, legal, fix={})
        self.given = sorted(given)


@dataclass(frozen=True)
class World:
    """This process's rank and the job's size, as set by torchrun; a single process without torchrun."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    elastic: bool = False
    """Whether torchrun (or our own elastic agent) started this process."""
    own_device: bool = False
    """Whether each rank sees only a GPU of its own, as number 0 (torchrun --virtual-local-rank)."""
    here: bool = True
    """Whether the ranks run on this machine and can use its devices."""

    def environment(self, port: int) -> dict[str, str]:
        """What torchrun would set for a rank of this host, whose store listens at this port."""
        place = map(str, (self.rank, self.size, self.local_rank, self.local_size))
        store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        return dict(zip(RANK_VARIABLES, place, strict=True)) | store

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> World:
        """An empty variable counts as none. Refuses torchrun's variables if some are set, by another job or by hand, and others are not."""
        given = {name: env[name] for name in (*RANK_VARIABLES, *MASTER_VARIABLES, RUN_ID) if env.get(name)}
        elastic = RUN_ID in given
        if not elastic and (given.get("RANK", "0"), given.get("WORLD_SIZE", "1")) == ("0", "1"):
            return cls()
        rank, size, local_rank, local_size = (_integer(given, name) for name in RANK_VARIABLES)
        for name, value in (("WORLD_SIZE", size), ("LOCAL_WORLD_SIZE", local_size)):
            if value < 1:
                raise WrongEnvironment(name, value, "a group has at least one rank", given)
        if size > 1:
            _required(given, "MASTER_ADDR")
            if (port := _integer(given, "MASTER_PORT")) not in PORTS:
                raise WrongEnvironment("MASTER_PORT", port, f"no port is above {PORTS[-1]}", given)
        for name, value, most in (("RANK", rank, size - 1), ("LOCAL_RANK", local_rank, local_size - 1)):
            if value > most:
                raise WrongEnvironment(name, value, f"there are ranks 0 to {most}", given)
        if size % local_size:
            why = f"does not divide WORLD_SIZE={size}"
            legal = "as many ranks on each host, the same --nproc-per-node"
            raise WrongEnvironment("LOCAL_WORLD_SIZE", local_size, why, given, legal)
        own_device = elastic and env.get(OWN_DEVICE, "0") not in ("", "0")
        if own_device:
            local_rank = rank % local_size  # torchrun says 0 on each
        elif elastic and local_rank == 0 != rank % local_size:
            why = f"rank {rank} is not the first on its host; --virtual-local-rank is known where tpresearch is installed"
            raise WrongEnvironment("LOCAL_RANK", 0, why, given, "torchrun without --virtual-local-rank")
        return cls(rank, size, local_rank, local_size, elastic, own_device)

    @property
    def hosts(self) -> int:
        return self.size // self.local_size


SINGLE_PROCESS = World()


@dataclass(frozen=True)
class SlurmStep:
    """The Slurm step that this process is a task of, as set by `srun`; a single task without it."""

    tasks: int = 1
    """Tasks of this same command that srun started, without torchrun in between. Only a step has this number: the batch
    script itself and an `salloc` shell count as one task."""
    task: int = 0
    nodes: int = 1
    job: str | None = None
    started: int | None = None
    """When the job started, in seconds since 1970."""
    step: str = "0"

    @classmethod
    def from_environment(cls, env: Mapping[str, str] = os.environ) -> SlurmStep:
        """An empty variable counts as none. Refuses one that is not a number."""
        names = {"tasks": "SLURM_STEP_NUM_TASKS", "task": "SLURM_PROCID", "nodes": "SLURM_STEP_NUM_NODES"}
        names["started"] = "SLURM_JOB_START_TIME"
        given = {name: env[name] for name in names.values() if env.get(name)}
        numbers = {field: _integer(given, name) for field, name in names.items() if name in given}
        if env.get("WORLD_SIZE"):
            numbers.pop("tasks", None)
        return cls(**numbers, job=env.get("SLURM_JOB_ID") or None, step=env.get("SLURM_STEP_ID") or "0")


def agent_store() -> tuple[str, int] | None:
    """Address and port of the store of torchrun's agent, where it shares it with the ranks."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def _integer(given: Mapping[str, str], name: str) -> int:
    text = _required(given, name)
    if not (text.isascii() and text.isdigit()):
        raise WrongEnvironment(name, text, "not a whole number", given)
    return int(text)


def _required(given: Mapping[str, str], name: str) -> str:
    if name not in given:
        other, value = next(iter(given.items()))
        raise WrongEnvironment(other, value, f"{name} is not set beside it", given)
    return given[name]


def usable_cores() -> int:
    """Cores that this process may use: all of the machine where the system binds no process to some, as macOS."""
    bound_to = getattr(os, "sched_getaffinity", None)
    return len(bound_to(0)) if bound_to else os.cpu_count() or 1
