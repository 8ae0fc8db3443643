"""The model of a config on the meta device: its modules and shapes, without storage."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from tpresearch.config.errors import ConfigError, nearest
from tpresearch.config.imports import imported_class
from tpresearch.config.model import ModelConfig
from tpresearch.config.schema import TrainConfig


def meta_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model without storage, its parameters in this dtype: see `plain_model`."""
    return plain_model(config, dtype, "meta")


def plain_model(config: ModelConfig, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The model as its class makes it, its parameters in this dtype: the one in which weights are kept, `weight_dtype`.
    Buffers are widened with them, and never narrowed: bfloat16 would blunt a rotary table.

    Raises:
        ConfigError: for a class that cannot be imported or does not take these settings.
    """
    build = imported_class("model._target_", config.target, nn.Module)
    accepted = inspect.signature(build).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    for key, value in config.args.items():
        if key not in accepted and not takes_any:
            raise ConfigError(
                f"model.{key}",
                value,
                f"{build.__name__} has no such setting",
                "one of " + ", ".join(nearest(key, accepted)),
            )
    try:
        with torch.device(device):
            model = build(**config.args)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "model", config.name, f"{build.__name__} refuses it: {error}", "settings that it accepts"
        ) from error
    if dtype is torch.bfloat16:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        return model
    return model.to(dtype)


def all_settings(config: ModelConfig) -> dict[str, Any]:
    """A model's settings, those included that its config leaves to the class."""
    accepted = inspect.signature(imported_class("model._target_", config.target, nn.Module)).parameters
    defaults = {name: p.default for name, p in accepted.items() if p.default is not inspect.Parameter.empty}
    return {**defaults, **config.args}


def weight_dtype(train: TrainConfig) -> torch.dtype:
    """In which weights are kept and trained. A dtype of bfloat16 is of computing alone, unless train.weights is too."""
    found: torch.dtype = getattr(torch, train.weight_dtype)
    return found
