"""The subset of the config that determines the result; runs are identified, repeated and compared by it."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from tpresearch.config.compose import to_plain
from tpresearch.config.schema import ComposedConfig

NOT_COMPARED = ("name", "logger", "world_size", "verify", "checkpoint", "resume", "gpus", "trace")
"""Keys of a config that do not determine the result: folders, loggers, and settings of other commands."""

DATA_NOT_COMPARED = ("cache_dir", "max_record_bytes")

EXPERIMENT_KEYS = ("data", "tokenizer", "optimizer", "schedule", "train", "init_from", "defects", "model")
"""Keys that determine the result, whatever the plan; the model comes last, since some of its settings follow from others."""

MAY_CHANGE_ON_RESUME = (
    *("steps", "tokens", "micro_batch_size", "log_every"),
    *("eval_every", "eval_rows", "on_nonfinite", "warmup_log_steps"),
)
"""Keys of train that may change when a run resumes."""

UNUSED_BY_OPTIMIZER = {"adamw": ("momentum",), "sgd": ("betas", "eps")}
"""Keys of optimizer that another one reads."""


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded config with the defaults of those keys that its run is too old to have."""
    defaults = to_plain(dataclasses.asdict(ComposedConfig()))
    return {key: _merged(defaults.get(key), value) for key, value in (defaults | dict(config)).items()}


def _merged(defaults: Any, values: Any) -> Any:
    return {**defaults, **values} if isinstance(defaults, dict) and isinstance(values, dict) else values


def comparable_config(config: Mapping[str, Any], without_seed: bool = False) -> dict[str, Any]:
    """The resolved config without names, paths and loggers."""
    kept = _without(config, NOT_COMPARED)
    if cluster := kept.pop("cluster", None):  # of a simulated run: told apart by its name and its numbers
        digest = hashlib.sha1(repr(cluster).encode()).hexdigest()
        kept["cluster"] = f"{cluster.get('name')} {digest[:6]}"
    kept["data"] = _without(kept.get("data", {}), DATA_NOT_COMPARED)
    if without_seed:
        kept["train"] = _without(kept["train"], ("seed",))
    return kept


def _without(config: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in keys}


def experiment_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The subset of the config that a resumed run must share with the run that wrote the checkpoint.

    Left out is what changes speed and memory alone (plan, mesh, micro-batch, device), what is logged and how often it
    is evaluated, and the budget, which may grow.
    """
    kept = comparable_config(config)
    kept["model"] = _without(kept["model"], ("plans", "blocks"))
    kept["train"] = _without(kept["train"], MAY_CHANGE_ON_RESUME)
    unused = UNUSED_BY_OPTIMIZER.get(str(kept["optimizer"].get("name")), ())
    kept["optimizer"] = _without(kept["optimizer"], ("compile", "split_masters", *unused))
    return {key: kept[key] for key in EXPERIMENT_KEYS}
