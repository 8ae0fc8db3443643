"""What a plan may shard along the sequence: no op may need all positions of a rank's part, and each weight needs a rule."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from tpresearch.config.axes import MeshSizes
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.plan.features import Across
from tpresearch.plan.probe import Probe
from tpresearch.plan.rules import SEQUENCE, ResolvedRule

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""The number of a layer in a name."""


def check_sequence(
    model: nn.Module, cfg: Config, sizes: MeshSizes, rules: dict[str, ResolvedRule], probe: Probe
) -> None:
    """Refuse what is wrong where a rule shards the sequence, or the batch: an op over the positions of a part, and weights
    without a rule, whose gradient would be partial on each rank.
    """
    sequence = cfg.data.has_sequence
    if sequence:
        split_by = {name: rule for name, rule in rules.items() if sizes[rule.axis] > 1}
        _check_positions(cfg, split_by, probe.across_positions)
    split = next(
        (rule for rule in rules.values() if (sequence and rule.shards_sequence) or rule.shards_batch), None
    )
    if split is None:
        return
    tokens = "a sharded sequence" if sequence and split.shards_sequence else "a sharded batch"
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        if module not in rules:
            why = f"{name} has no sharding rule; with {tokens} its gradient would be partial on each {split.axis} rank"
            legal = "a rule for it: style sequence, or style input with null layouts where its input is whole"
            plan = cfg.parallel.tensor
            raise ConfigError(f"model.plans.{plan}", plan, why, legal, rule_to_add(cfg, module))


def _check_positions(cfg: Config, rules: Mapping[str, ResolvedRule], across: Across) -> None:
    converting = [name for name, rule in rules.items() if rule.rule.style in ("input", "output", None)]
    for name, rule in rules.items():
        stays_split = SEQUENCE in rule.dst and rule.rule.style != "input"
        for running, op in across.get(name, {}).items() if stays_split else ():
            if any(_holds(each, name) != _holds(each, running) for each in converting):
                continue  # it is made whole on the way
            why = (
                f"{op} in {running or 'the model'} needs all positions of the output of {name}, and each rank would apply it to "
                "its part of the sequence alone"
            )
            legal = "parallel.tensor=tp, or a module of its own for that, with a rule whose _target_ is a ParallelStyle that gathers its input"
            fix: dict[str, object] = {"parallel.tensor": "tp"} if "tp" in cfg.model.plans else {}
            raise ConfigError(f"{rule.config_key}.dst", rule.rule.dst or "shard:1", why, legal, fix=fix)


def _holds(module: str, other: str) -> bool:
    return not module or f"{other}.".startswith(f"{module}.")


def rule_to_add(cfg: Config, module: str, layout: str = "") -> dict[str, object]:
    """An override that adds a rule of style sequence for this module and those of other blocks."""
    pattern = LAYER_NUMBER.sub("*", module) or "."
    plan = cfg.parallel.tensor or ""
    name = next((part for part in reversed(pattern.split(".")) if part.isidentifier()), "root")
    name += "_2" * (name in cfg.model.plans[plan])
    same = f",src:'{layout}',dst:'{layout}'" if layout else ""
    return {f"+model.plans.{plan}.{name}": f"{{match:{pattern},style:sequence{same}}}"}
