"""What the size of an axis has to divide: as far as a config alone says it, and the refusal; no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tpresearch.config.axes import AXES, MeshSizes
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config, DataPlan, ParallelConfig

SEQUENCE_DIM = 1
"""Activations are [b, s, h]."""


@dataclass(frozen=True)
class Cut:
    """A count that the size of an axis has to divide."""

    axis: str
    what: str
    count: int
    why: str


def check_declared(cfg: Config, sizes: MeshSizes) -> None:
    """Judge the sizes by the units and layouts of the plan's rules; the compiler looks at every weight as well.

    Raises:
        ConfigError: for the first that does not divide.
    """
    check_divisible(cfg.parallel, sizes, list(_declared(cfg)))


def _declared(cfg: Config) -> Iterator[Cut]:
    rules = cfg.model.plans.get(cfg.parallel.tensor or "", {})
    for name, rule in rules.items():
        for unit in rule.units:
            count = cfg.model.args.get(unit)
            if isinstance(count, int) and count > 0:
                yield Cut(rule.axis, f"model.{unit}", count, f"rule {name} splits it")
        layouts = [
            layout for side in (rule.src, rule.dst) for layout in (side if isinstance(side, list) else [side])
        ]
        if f"shard:{SEQUENCE_DIM}" in layouts:
            yield Cut(rule.axis, "data.seq_len", cfg.data.seq_len, f"rule {name} splits the sequence")


def check_divisible(parallel: ParallelConfig, sizes: MeshSizes, cuts: Sequence[Cut]) -> None:
    """Raises:
    ConfigError: for the first count that its axis does not divide, with the sizes that all of them allow.
    """
    wrong = next((cut for cut in cuts if cut.count % sizes.get(cut.axis, 1)), None)
    if wrong is None:
        return
    size, key = sizes[wrong.axis], f"mesh.{wrong.axis}"
    common = math.gcd(*(cut.count for cut in cuts if cut.axis == wrong.axis))
    divide = [t for t in range(1, common + 1) if common % t == 0]
    fits = [t for t in divide if sizes.world % t == 0]
    alone = parallel.data is DataPlan.none
    below = max(t for t in divide if t <= size)
    others = {f"mesh.{axis.name}": None for axis in AXES if axis.name != wrong.axis}
    why = f"does not divide {wrong.what}={wrong.count} ({wrong.why})"
    legal = f"legal for this model: {_few(divide)}"
    fix = {key: below} if alone else {key: fits[-1], **others}
    raise ConfigError(key, size, why, legal, fix, nproc=below if alone else None)


def _few(numbers: list[int]) -> str:
    return " ".join(map(str, numbers if len(numbers) <= 8 else [*numbers[:8], "..."]))
