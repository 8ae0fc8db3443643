"""A rule for each weight, where a plan shards the sequence or the batch."""

from __future__ import annotations

import re

from torch import nn

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.plan.probe import Probe
from tpresearch.plan.rules import SEQUENCE, ResolvedRule, tensors_of

LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
"""The number of a layer in a name."""


def check_sequence(model: nn.Module, cfg: Config, rules: dict[str, ResolvedRule], probe: Probe) -> None:
    """Refuse a weight without a rule where one shards the sequence, or the batch: its gradient would be partial on each rank."""
    by_sequence = [rule for name, rule in rules.items() if splits_sequence(name, rule, cfg, probe)]
    split = next(iter(by_sequence or [rule for rule in rules.values() if rule.shards_batch]), None)
    if split is None:
        return
    tokens = "a sharded sequence" if by_sequence else "a sharded batch"
    for name, _ in model.named_parameters():
        module = name.rpartition(".")[0]
        if module not in rules:
            why = f"{name} has no sharding rule; with {tokens} its gradient would be partial on each {split.axis} rank"
            legal = "a rule for it: style sequence, or style input with src and dst [null] where its input is whole"
            plan, fix = cfg.parallel.tensor, rule_to_add(cfg, module)
            if isinstance(model.get_submodule(module), nn.Embedding) and module in probe.shapes:
                (shape,) = probe.shapes[module].outputs
                dst = f"shard:{len(shape or ()) - 2}"
                legal = (
                    f"a rule for it: style rowwise, src replicate and dst {dst}, the positions of its output"
                )
                fix = rule_to_add(cfg, module, "replicate", dst, "rowwise")
            raise ConfigError(f"model.plans.{plan}", plan, why, legal, fix)


def splits_sequence(module: str, rule: ResolvedRule, cfg: Config, probe: Probe) -> bool:
    """Whether a rule splits an activation of this module along the sequence; dim 1 of `[b, heads, s, d]` is none."""
    if not cfg.data.has_sequence or not rule.shards_sequence or module not in probe.shapes:
        return cfg.data.has_sequence and rule.shards_sequence
    shapes = [x for *_, layout, x in tensors_of(rule, probe.shapes[module]) if layout == SEQUENCE and x]
    length = cfg.data.seq_len
    return any(len(x) < 4 or x[1] == length or x[2] != length for x in shapes)


def rule_to_add(
    cfg: Config, module: str, src: str = "", dst: str = "", style: str = "sequence"
) -> dict[str, object]:
    """An override that adds a rule for this module and those of other blocks; `dst` is as `src`, unless given."""
    pattern = LAYER_NUMBER.sub("*", module) or "."
    plan = cfg.parallel.tensor or ""
    name = next((part for part in reversed(pattern.split(".")) if part.isidentifier()), "root")
    name += "_2" * (name in cfg.model.plans[plan])
    layouts = f",src:'{src}',dst:'{dst or src}'" if src else ""
    return {f"+model.plans.{plan}.{name}": f"{{match:{pattern},style:{style}{layouts}}}"}
