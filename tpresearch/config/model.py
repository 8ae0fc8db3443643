"""A model with its sharding rules, read from a file of conf/model and the files of conf/plan that it includes, and written back."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from tpresearch.config.errors import ConfigError
from tpresearch.config.near_names import nearest
from tpresearch.config.values import check_usable, check_value

MODEL_KEYS = {"name", "_target_", "blocks", "plans"}
RULE_KEYS = ("match", "style", "src", "dst", "axis", "units")
LAYOUT_KEYS = ("src", "dst")
"""Of a rule with a `_target_` they are its arguments, as keys that are not ours are."""


@dataclass(slots=True)
class Rule:
    """One named sharding rule of a plan: which modules, in which style, with which layouts.

    Layouts are `replicate`, `shard:N`, and for the model's output `logits` (vocabulary-sharded) or `batch`
    (split by rows): kept for the loss under loss_parallel, otherwise replicated. A list gives one layout per
    positional input; null leaves that input unchanged.
    """

    match: str = ""
    """Wildcards over module names, matched component by component between the dots; `.` is the model itself."""
    style: str | None = None
    """colwise, rowwise, sequence, input or output."""
    src: str | list[str | None] | None = None
    """Layout of the incoming input (for `output`: of the output as the module produces it)."""
    dst: str | list[str | None] | None = None
    """Desired layout: of the output (colwise, rowwise, output), or of the input (input)."""
    axis: str = "tp"
    """The mesh axis it acts on."""
    units: list[str] = field(default_factory=list)
    """Model settings that count indivisible units, such as n_heads: a shard must not cut one."""
    target: str | None = None
    """Instead of a style: the import path of a custom ParallelStyle (`_target_` in YAML)."""
    args: dict[str, Any] = field(default_factory=dict)
    """Its arguments: every key of the rule but match, axis and units."""


@dataclass(slots=True)
class ModelConfig:
    name: str
    target: str
    """Import path of an nn.Module class (`_target_` in YAML)."""
    args: dict[str, Any]
    """Keyword arguments of that class: every other key of the model's YAML file."""
    blocks: list[str]
    """Wildcards over module names: the units of FSDP, checkpointing and compile."""
    plans: dict[str, dict[str, Rule]]
    """Sharding plans by name (tp, sp), each a dict of named rules."""


def model_config(raw: dict[str, Any]) -> ModelConfig:
    """A model's YAML: `name`, `_target_`, `blocks` and `plans` are ours, every other key is the class's.

    Refuses a key of ours of the wrong form, and unusable values.
    """
    for key in ("name", "_target_"):
        if not isinstance(text := raw.get(key), str) or not text.strip():
            why, legal = "a model needs it", "text, as in its conf/model file"
            raise ConfigError(f"model.{key}", raw.get(key), why, legal)
    check_usable("model", {key: value for key, value in raw.items() if key != "plans"})
    blocks, raw_plans = raw.get("blocks") or [], raw.get("plans") or {}
    check_value("model.blocks", blocks, list[str])
    check_value("model.plans", raw_plans, dict[str, Any])
    plans = {}
    for plan, rules in raw_plans.items():
        where = f"model.plans.{plan}"
        if not isinstance(rules, dict):
            raise ConfigError(where, rules, "not a sharding plan", "a dict of named rules")
        plans[plan] = {str(name): _rule(f"{where}.{name}", rule) for name, rule in rules.items()}
    args = {key: value for key, value in raw.items() if key not in MODEL_KEYS}
    return ModelConfig(raw["name"], raw["_target_"], args, blocks, plans)


def _rule(where: str, raw: Any) -> Rule:
    if not isinstance(raw, dict) or not raw.get("match"):
        why, legal = "not a sharding rule", "a dict with match and style, or match and _target_"
        raise ConfigError(where, raw, why, legal)
    has_target = raw.get("_target_") is not None
    own = {key for key in RULE_KEYS if not (has_target and key in LAYOUT_KEYS and raw.get(key) is not None)}
    ours = {key: value for key, value in raw.items() if key in own}
    rest = {key: value for key, value in raw.items() if key not in own and key != "_target_"}
    if rest and not has_target:
        wrong = next(iter(rest))
        why, legal = "no such key in a rule", f"one of {', '.join(nearest(str(wrong), RULE_KEYS))}"
        raise ConfigError(f"{where}.{wrong}", rest[wrong], why, legal)
    hints = get_type_hints(Rule)
    for key, value in ours.items():
        check_value(f"{where}.{key}", value, hints[key])
    check_value(f"{where}._target_", raw.get("_target_"), hints["target"])
    check_usable(where, rest)
    return Rule(**ours, target=raw.get("_target_"), args=rest)


def model_as_dict(model: ModelConfig) -> dict[str, Any]:
    """A model as plain data, in the shape of the YAML files."""
    plans = {
        plan: {name: _rule_as_dict(dataclasses.asdict(rule)) for name, rule in rules.items()}
        for plan, rules in model.plans.items()
    }
    named = {"name": model.name, "_target_": model.target}
    return {**named, **model.args, "blocks": model.blocks, "plans": plans}


def _rule_as_dict(rule: dict[str, Any]) -> dict[str, Any]:
    shown = {key: rule[key] for key in RULE_KEYS if rule[key]}
    return {**shown, **({"_target_": rule["target"], **rule["args"]} if rule["target"] else {})}
