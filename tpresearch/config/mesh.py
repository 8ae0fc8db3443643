"""Sizes of the mesh axes: those that are set, completed by the defaults of the parallel plan; and the divisibility of
what they shard, as far as the config alone determines it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpresearch.config.axes import AXES, AXES_OF_DATA_PLAN, AXIS_NAMES, TENSOR, Axis, MeshSizes
from tpresearch.config.errors import ConfigError
from tpresearch.config.near_names import nearest
from tpresearch.config.schema import Config, DataPlan, MeshConfig, ParallelConfig


def used_axes(parallel: ParallelConfig) -> tuple[Axis, ...]:
    """The axes that a parallel plan shards or splits over, outermost first."""
    return AXES_OF_DATA_PLAN[parallel.data] + ((TENSOR,) if parallel.tensor else ())


def resolve_mesh(mesh: MeshConfig, parallel: ParallelConfig, world: int, hosts: int = 1) -> MeshSizes:
    """The sizes of all axes for a job of `world` ranks on `hosts` hosts.

    Refuses more than one -1, a size of 0, an axis that the plan does not use, and a product that is not the world size.
    """
    given: dict[str, int | None] = {name: getattr(mesh, name) for name in AXIS_NAMES}
    used = used_axes(parallel)
    rest = [name for name, size in given.items() if size == -1]
    if len(rest) > 1:
        why, legal = f"mesh.{rest[0]} is -1 too", "at most one axis can be -1"
        raise ConfigError(f"mesh.{rest[1]}", -1, why, legal)
    for axis in AXES:
        size = given[axis.name]
        if size == 0:
            legal = "1 or more, -1 for the remaining ranks, null for the plan's default"
            raise ConfigError(f"mesh.{axis.name}", size, "not a number of ranks", legal)
        if axis not in used and (size or 0) > 1:
            why = f"parallel={parallel.name} does not shard over this axis"
            listed = " and ".join(f"mesh.{one.name}" for one in used) or "no axis"
            legal = f"it uses {listed}; plans with {axis.name}: {axis.options}"
            raise ConfigError(f"mesh.{axis.name}", size, why, legal)
    sizes = _complete(given, used, world, hosts)
    if sizes.world != world:
        _refuse_product(sizes, mesh, parallel, world)
    return sizes


def warning_of_unused_axes(sizes: MeshSizes, parallel: ParallelConfig) -> str | None:
    """The warning for a plan with axes of size 1: it does not do what its name promises."""
    used = used_axes(parallel)
    missing = [axis.name for axis in used if sizes[axis.name] == 1]
    if not missing:
        return None
    needed = math.prod(max(sizes[axis.name], 2) for axis in used)
    ranks = f"{sizes.world} rank{'s' * (sizes.world > 1)}"
    return (
        f"parallel={parallel.name} on {ranks} runs without {' and '.join(missing)} (size 1); "
        f"with {needed} ranks each of its axes can have 2 or more"
    )


def _complete(given: dict[str, int | None], used: tuple[Axis, ...], world: int, hosts: int) -> MeshSizes:
    """Complete the open sizes, innermost axis first: each takes its default size, and one takes the remaining ranks."""
    sizes = {axis.name: given[axis.name] for axis in used}
    left = world
    for size in sizes.values():
        left = max(left // size, 1) if size and size > 0 else left
    unset = [axis for axis in reversed(used) if sizes[axis.name] is None]
    unset.sort(key=lambda axis: not axis.default_size)
    takes_rest = next((name for name, size in sizes.items() if size == -1), unset[-1].name if unset else None)
    for axis in unset:
        if axis.name != takes_rest:
            size = sizes[axis.name] = axis.default_size(left, world, hosts) if axis.default_size else 1
            left = max(left // size, 1)
    if takes_rest:
        sizes[takes_rest] = left
    return MeshSizes(**{name: size or 1 for name, size in sizes.items()})


def _refuse_product(sizes: MeshSizes, mesh: MeshConfig, parallel: ParallelConfig, world: int) -> None:
    if not (used := used_axes(parallel)):
        why = f"runs on a single process, but the world size is {world}"
        options = {option for axis in AXES for option in axis.options.split()}
        ordered = sorted(options, key=lambda option: (len(option), option))  # those of one axis first
        legal = f"1 rank, or a plan for several ranks: {' '.join(ordered)}"
        raise ConfigError("parallel", parallel.name, why, legal, fix={"parallel": "fsdp"})
    name = [axis.name for axis in used if getattr(mesh, axis.name) not in (None, -1)][-1]
    others = sizes.world // sizes[name]
    product = "*".join(f"{axis.name}={sizes[axis.name]}" for axis in used)
    fix: dict[str, object] = {}
    if used == (TENSOR,) and world % sizes.world == 0:
        legal = f"mesh.tp={world}, or a plan with a data axis for the remaining ranks: fsdp_tp"
        fix = {"parallel": "fsdp_tp"}
    elif world % others == 0:
        legal = f"mesh.{name}={world // others}, or {sizes.world} ranks"
        fix = {f"mesh.{name}": world // others}
    else:
        legal = f"{sizes.world} ranks"
    why = f"{product} is {sizes.world} ranks, but the world size is {world}"
    raise ConfigError(f"mesh.{name}", sizes[name], why, legal, fix=fix, nproc=None if fix else sizes.world)


SEQUENCE_DIM = 1
"""Activations are [b, s, h] where rows are sequences."""


@dataclass(frozen=True)
class ShardedCount:
    """A count that must be divisible by the size of an axis."""

    axis: str
    what: str
    count: int
    why: str


def check_declared_counts(cfg: Config, sizes: MeshSizes) -> None:
    """Refuse sizes that do not divide the units and layouts of the plan's rules; the compiler also checks every weight."""
    check_divisible(cfg.parallel, sizes, list(declared_counts(cfg)))


def declared_counts(cfg: Config) -> Iterator[ShardedCount]:
    """The counts that the plan's rules declare to split; refuses a unit that is not a setting of the model."""
    plan, args = cfg.parallel.tensor or "", cfg.model.args
    for name, rule in cfg.model.plans.get(plan, {}).items():
        for unit in rule.units:
            if unit not in args:
                counts = [key for key, value in args.items() if isinstance(value, int)]
                legal = "one of " + ", ".join(nearest(unit, counts))
                where = f"model.plans.{plan}.{name}.units"
                raise ConfigError(where, unit, "no such model setting", legal)
            count = args[unit]
            if isinstance(count, int) and count > 0:
                yield ShardedCount(rule.axis, f"model.{unit}", count, f"rule {name} splits it")
        layouts = [
            layout for side in (rule.src, rule.dst) for layout in (side if isinstance(side, list) else [side])
        ]
        if cfg.data.has_sequence and f"shard:{SEQUENCE_DIM}" in layouts:
            why = f"rule {name} splits the sequence"
            yield ShardedCount(rule.axis, "data.seq_len", cfg.data.seq_len, why)


def check_divisible(parallel: ParallelConfig, sizes: MeshSizes, counts: Sequence[ShardedCount]) -> None:
    """Refuse mesh sizes for the first count that its axis does not divide, with the sizes that all of them allow."""
    wrong = next((one for one in counts if one.count % sizes.get(one.axis, 1)), None)
    if wrong is None:
        return
    size, key = sizes[wrong.axis], f"mesh.{wrong.axis}"
    common = math.gcd(*(one.count for one in counts if one.axis == wrong.axis))
    divide = [t for t in range(1, common + 1) if common % t == 0]
    fits = [t for t in divide if sizes.world % t == 0]
    alone = parallel.data is DataPlan.none
    below = max(t for t in divide if t <= size)
    others = {f"mesh.{axis.name}": None for axis in AXES if axis.name != wrong.axis}
    why = f"does not divide {wrong.what}={wrong.count} ({wrong.why})"
    few = divide if len(divide) <= 8 else [*divide[:8], "..."]
    legal = f"legal for this model: {' '.join(map(str, few))}"
    fix = {key: below} if alone else {key: fits[-1], **others}
    raise ConfigError(key, size, why, legal, fix, nproc=below if alone else None)
