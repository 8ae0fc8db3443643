"""How many ranks lie along each mesh axis: what was asked, completed by what the parallel plan would choose."""

from __future__ import annotations

from dataclasses import dataclass

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import DataPlan, MeshConfig, ParallelConfig

AXES = ("dp_replicate", "dp_shard", "tp")
"""Outermost first: ranks next to each other, inside a host, differ along tp."""


@dataclass(frozen=True)
class MeshSizes:
    """Ranks along each axis."""

    dp_replicate: int = 1
    dp_shard: int = 1
    tp: int = 1

    @property
    def dp(self) -> int:
        """Replicas of the model's computation: the ways into which a global batch is split."""
        return self.dp_replicate * self.dp_shard

    @property
    def world(self) -> int:
        return self.dp * self.tp

    def live(self) -> dict[str, int]:
        """The axes along which there is more than one rank."""
        return {axis: getattr(self, axis) for axis in AXES if getattr(self, axis) > 1}

    def describe(self, device: str) -> str:
        """The mesh as torch prints one with its ranks written out; a lone data axis is called dp."""
        live = self.live()
        names = list(live) or ["dp_shard"]
        if len([name for name in names if name != "tp"]) == 1:
            names = ["tp" if name == "tp" else "dp" for name in names]
        shape = list(live.values()) or [1]
        return f"DeviceMesh('{device}', {_nested(list(range(self.world)), shape)}, mesh_dim_names={tuple(names)})"


def _nested(ranks: list[int], shape: list[int]) -> list:
    if len(shape) == 1:
        return ranks
    step = len(ranks) // shape[0]
    return [_nested(ranks[i : i + step], shape[1:]) for i in range(0, len(ranks), step)]


def used_axes(parallel: ParallelConfig) -> set[str]:
    """The axes that a parallel plan has a use for."""
    axes = {
        DataPlan.none: set(),
        DataPlan.ddp: {"dp_replicate"},
        DataPlan.fsdp: {"dp_shard"},
        DataPlan.hsdp: {"dp_replicate", "dp_shard"},
    }[parallel.data]
    return axes | ({"tp"} if parallel.tensor else set())


def resolve_mesh(mesh: MeshConfig, parallel: ParallelConfig, world: int, hosts: int = 1) -> MeshSizes:
    """The sizes of all axes for a job of `world` ranks on `hosts` hosts.

    Raises:
        ConfigError: more than one -1, a size that is not a count, an axis that the plan has no use for, or a
            product that is not the world size.
    """
    given = {axis: getattr(mesh, axis) for axis in AXES}
    used = used_axes(parallel)
    rest = [axis for axis, size in given.items() if size == -1]
    if len(rest) > 1:
        raise ConfigError(
            f"mesh.{rest[1]}",
            -1,
            f"mesh.{rest[0]} is -1 too",
            "one axis at most can take what is left",
            fix={f"mesh.{rest[1]}": None},
        )
    for axis, size in given.items():
        if size is not None and size != -1 and size < 1:
            raise ConfigError(
                f"mesh.{axis}",
                size,
                "not a number of ranks",
                "1 or more, -1 for what is left, null for the plan's choice",
                fix={f"mesh.{axis}": None},
            )
        if axis not in used and size is not None and size > 1:
            raise ConfigError(
                f"mesh.{axis}",
                size,
                f"parallel={parallel.name} has no use for this axis",
                f"it uses {_names(used)}; plans with {axis}: {_plans_with(axis)}",
                fix={f"mesh.{axis}": None},
            )
    sizes = _complete(given, used, world, hosts)
    if sizes.world != world:
        _refuse_product(sizes, given, parallel, used, world)
    return sizes


def _complete(given: dict[str, int | None], used: set[str], world: int, hosts: int) -> MeshSizes:
    """Fill in what was left open: each open axis takes its customary size, and the last one what is then left."""
    sizes = {axis: given[axis] if axis in used else 1 for axis in AXES}
    left = world
    for size in sizes.values():
        left = max(left // size, 1) if size and size > 0 else left
    unset = [axis for axis in ("tp", "dp_replicate", "dp_shard") if sizes[axis] is None]
    takes_rest = next((axis for axis in AXES if sizes[axis] == -1), unset[-1] if unset else None)
    for axis in unset:
        if axis != takes_rest:
            size = sizes[axis] = _customary(axis, left, world, hosts)
            left = max(left // size, 1)
    if takes_rest:
        sizes[takes_rest] = left
    return MeshSizes(**{axis: size or 1 for axis, size in sizes.items()})


def _customary(axis: str, left: int, world: int, hosts: int) -> int:
    """tp spans a host, and is the tutorial's 2 on one host; replicas go across hosts, and are few on one host."""
    if axis == "tp":
        return world // hosts if hosts > 1 else (2 if left % 2 == 0 else 1)
    return hosts if 1 < hosts < left else _smallest_factor(left)


def _smallest_factor(n: int) -> int:
    return next((f for f in range(2, n + 1) if n % f == 0), 1)


def _refuse_product(
    sizes: MeshSizes, given: dict[str, int | None], parallel: ParallelConfig, used: set[str], world: int
) -> None:
    if not used:
        raise ConfigError(
            "parallel",
            parallel.name,
            f"one process computes it, and there are {world} ranks",
            "1 rank, or a plan that shares the work: ddp tp sp fsdp hsdp fsdp_tp hsdp_tp",
            fix={"parallel": "fsdp"},
        )
    set_axes = [axis for axis in AXES if axis in used and given[axis] not in (None, -1)]
    axis = set_axes[-1]
    others = sizes.world // getattr(sizes, axis)
    product = "*".join(f"{name}={getattr(sizes, name)}" for name in AXES if name in used)
    if used == {"tp"} and world % sizes.world == 0:
        legal, fix, nproc = (
            f"mesh.tp={world}, or a plan that has a data axis for the rest: fsdp_tp",
            {"parallel": "fsdp_tp"},
            None,
        )
    elif world % others == 0:
        legal, fix, nproc = (
            f"mesh.{axis}={world // others}, or {sizes.world} ranks",
            {f"mesh.{axis}": world // others},
            None,
        )
    else:
        legal, fix, nproc = f"{sizes.world} ranks", {}, sizes.world
    raise ConfigError(
        f"mesh.{axis}",
        getattr(sizes, axis),
        f"{product} is {sizes.world} ranks and the world has {world}",
        legal,
        fix=fix,
        nproc=nproc,
    )


def _names(axes: set[str]) -> str:
    return " and ".join(f"mesh.{axis}" for axis in AXES if axis in axes) or "no axis"


def _plans_with(axis: str) -> str:
    return {
        "dp_replicate": "ddp hsdp hsdp_tp",
        "dp_shard": "fsdp hsdp fsdp_tp hsdp_tp",
        "tp": "tp sp fsdp_tp hsdp_tp",
    }[axis]
