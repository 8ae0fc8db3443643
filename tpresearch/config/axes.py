"""The mesh axes, each defined once: what ranks that differ along an axis do with rows, weights and layers.

A new axis (context, pipeline stages) is a row of this table, a field of `MeshConfig`, and the code that carries it
out in `parallel/`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tpresearch.config.choices import DataPlan


@dataclass(frozen=True)
class Axis:
    name: str
    options: str
    """The options of conf/parallel that use it."""
    default_size: Callable[[int, int, int], int] | None
    """Its default size, as a function of (remaining ranks, world size, hosts); None takes the remaining ranks."""
    collectives: tuple[str, ...]
    """The collectives along it."""
    splits_rows: bool = False
    """Ranks along it read different rows of the global batch: losses, counts and gradients are summed over it."""
    shards_state: bool = False
    """Each rank along it keeps its shard of every parameter, gradient and optimizer state."""
    shards_layers: bool = False
    """Sharding rules may name it: it shards the computation of layers."""
    crosses_hosts: bool = True
    """Whether it may span hosts without a warning: its traffic is rare or overlaps with computing."""


def _one_replica_per_host(left: int, world: int, hosts: int) -> int:
    """One replica per host, and few on a single host."""
    per_host = 1 < hosts < left and left % hosts == 0
    return hosts if per_host else next((f for f in range(2, left + 1) if left % f == 0), 1)


def _ranks_of_a_host(left: int, world: int, hosts: int) -> int:
    """The ranks per host; the tutorial's 2 on a single host."""
    return world // hosts if hosts > 1 else (2 if left % 2 == 0 else 1)


OF_SHARDS = ("all_gather", "reduce_scatter", "all_reduce")
REPLICATE = Axis("dp_replicate", "ddp hsdp hsdp_tp", _one_replica_per_host, ("all_reduce",), splits_rows=True)
SHARD = Axis("dp_shard", "fsdp hsdp fsdp_tp hsdp_tp", None, OF_SHARDS, splits_rows=True, shards_state=True)
TENSOR = Axis(
    "tp", "tp sp fsdp_tp hsdp_tp", _ranks_of_a_host, OF_SHARDS, shards_layers=True, crosses_hosts=False
)

AXES = (REPLICATE, SHARD, TENSOR)
"""Outermost first: adjacent ranks, inside a host, differ along the last."""
AXIS_NAMES = tuple(axis.name for axis in AXES)
DATA_AXES = tuple(axis.name for axis in AXES if axis.splits_rows)
LAYER_AXES = tuple(axis.name for axis in AXES if axis.shards_layers)

AXES_OF_DATA_PLAN: dict[DataPlan, tuple[Axis, ...]] = {
    DataPlan.none: (),
    DataPlan.ddp: (REPLICATE,),
    DataPlan.fsdp: (SHARD,),
    DataPlan.hsdp: (REPLICATE, SHARD),
}


class MeshSizes(dict[str, int]):
    """Ranks along each axis, by name and in the order of `AXES`; an axis that is not given has size 1."""

    def __init__(self, **sizes: int) -> None:
        super().__init__({name: sizes.pop(name, 1) for name in AXIS_NAMES})
        assert not sizes, f"no such axes: {sizes}"

    def ranks_along(self, axes: Iterable[Axis]) -> int:
        return math.prod(self[axis.name] for axis in axes)

    @property
    def dp(self) -> int:
        """Number of data-parallel ranks, over which a global batch is split."""
        return self.ranks_along(axis for axis in AXES if axis.splits_rows)

    @property
    def shards(self) -> int:
        """Number of FSDP shards of parameters, gradients and optimizer state, in addition to what rules shard."""
        return self.ranks_along(axis for axis in AXES if axis.shards_state)

    @property
    def tp(self) -> int:
        return self[TENSOR.name]

    @property
    def world(self) -> int:
        return self.ranks_along(AXES)

    def nontrivial(self) -> dict[str, int]:
        """The axes with more than one rank, and their sizes."""
        return {name: size for name, size in self.items() if size > 1}
