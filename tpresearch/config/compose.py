"""From what Hydra composed to the typed `Config`, its paths resolved: the one place where a DictConfig is read."""

from __future__ import annotations

import dataclasses
import glob
from pathlib import Path
from typing import Any, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from tpresearch.config.bounds import check_bounds
from tpresearch.config.errors import ConfigError, nearest
from tpresearch.config.model import ModelConfig, Rule
from tpresearch.config.reading import check_sane, check_value
from tpresearch.config.schema import ComposedConfig, Config, SlurmConfig, TorchrunConfig

MODEL_KEYS = {"name", "_target_", "blocks", "plans"}
RULE_KEYS = {"match", "style", "src", "dst", "axis", "units"}
FOLDERS = ("data.cache_dir", "logger.dir")
"""Keys of folders that may have to be made."""
PATHS = ("data.path", "tokenizer.path", "init_from", "resume")
"""Keys of what is there already; where nothing is, the value is no path but a name, as of a data set on the hub."""


def register_schema() -> None:
    """Make `schema`, the first line of a defaults list, mean `ComposedConfig`: unknown keys and wrong types fail."""
    ConfigStore.instance().store(name="schema", node=ComposedConfig)
    launchers = {"torchrun_schema": TorchrunConfig, "slurm_schema": SlurmConfig}
    for name, schema in launchers.items():
        ConfigStore.instance().store(name=name, node=schema, group="hydra/launcher")


def typed(composed: DictConfig) -> Config:
    """The dataclasses of a composed config, interpolations resolved.

    Raises:
        ConfigError: for a model or rule that does not have the shape of one, and for values out of bounds.
        omegaconf.errors.OmegaConfBaseException: for a missing value or a wrong interpolation.
    """
    found = OmegaConf.to_object(composed)
    assert isinstance(found, ComposedConfig)
    check_bounds(found)
    values = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    return Config(**{**values, "model": model_config(values["model"])})


def model_config(raw: dict[str, Any]) -> ModelConfig:
    """A model's YAML: `name`, `_target_`, `blocks` and `plans` are ours, every other key is the class's.

    Raises:
        ConfigError: for a key of ours that has not its shape, and for values that nothing could work with.
    """
    for key in ("name", "_target_"):
        if not isinstance(raw.get(key), str):
            raise ConfigError(
                f"model.{key}", raw.get(key), "a model needs it", "a string, in its conf/model file"
            )
    check_sane("model", {key: value for key, value in raw.items() if key != "plans"})
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
        raise ConfigError(
            where, raw, "not a sharding rule", "a dict with match and style, or match and _target_"
        )
    ours = {key: value for key, value in raw.items() if key in RULE_KEYS}
    rest = {key: value for key, value in raw.items() if key not in RULE_KEYS and key != "_target_"}
    if rest and "_target_" not in raw:
        wrong = next(iter(rest))
        raise ConfigError(
            f"{where}.{wrong}",
            rest[wrong],
            "no such key in a rule",
            f"one of {', '.join(nearest(str(wrong), RULE_KEYS))}",
        )
    hints = get_type_hints(Rule)
    for key, value in ours.items():
        check_value(f"{where}.{key}", value, hints[key])
    check_value(f"{where}._target_", raw.get("_target_"), hints["target"])
    check_sane(where, rest)
    return Rule(**ours, target=raw.get("_target_"), args=rest)


def as_dict(cfg: Config) -> dict[str, Any]:
    """The resolved config as plain data, in the shape of the YAML files: what a run folder and W&B keep."""
    values = dataclasses.asdict(cfg)
    model = values["model"]
    values["model"] = {
        "name": model["name"],
        "_target_": model["target"],
        **model["args"],
        "blocks": model["blocks"],
        "plans": {
            plan: {name: _plain_rule(rule) for name, rule in rules.items()}
            for plan, rules in model["plans"].items()
        },
    }
    return {key: plain(value) for key, value in values.items()}


def _plain_rule(rule: dict[str, Any]) -> dict[str, Any]:
    shown = {key: rule[key] for key in ("match", "style", "src", "dst", "axis", "units") if rule[key]}
    return {**shown, **({"_target_": rule["target"], **rule["args"]} if rule["target"] else {})}


def plain(value: Any) -> Any:
    """Of enums their names, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, str) else value  # an enum becomes its name


def resolve_paths(cfg: Config) -> None:
    """Make relative paths absolute, in place."""
    for key in (*FOLDERS, *PATHS):
        branch, _, name = key.rpartition(".")
        owner = getattr(cfg, branch) if branch else cfg
        setattr(owner, name, _resolved(getattr(owner, name), always=key in FOLDERS))


def _resolved(value: Any, always: bool) -> Any:
    if isinstance(value, list):
        return [_resolved(item, always) for item in value]
    if not isinstance(value, str) or not value.strip():
        return value
    path = Path(value).expanduser()
    return str(path.absolute()) if always or path.exists() or glob.glob(str(path), recursive=True) else value
