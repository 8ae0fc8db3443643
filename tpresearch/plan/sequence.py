"""A rule for each weight, where a plan shards the sequence or the batch."""

from __future__ import annotations

import re

from torch import nn

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.plan.rules import ResolvedRule

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""The number of a layer in a name."""


def check_sequence(model: nn.Module, cfg: Config, rules: dict[str, ResolvedRule]) -> None:
    """Refuse a weight without a rule where one shards the sequence, or the batch: its gradient would be partial on each rank."""
    sequence = cfg.data.has_sequence
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


def rule_to_add(cfg: Config, module: str, layout: str = "") -> dict[str, object]:
    """An override that adds a rule of style sequence for this module and those of other blocks."""
    pattern = LAYER_NUMBER.sub("*", module) or "."
    plan = cfg.parallel.tensor or ""
    name = next((part for part in reversed(pattern.split(".")) if part.isidentifier()), "root")
    name += "_2" * (name in cfg.model.plans[plan])
    same = f",src:'{layout}',dst:'{layout}'" if layout else ""
    return {f"+model.plans.{plan}.{name}": f"{{match:{pattern},style:sequence{same}}}"}
