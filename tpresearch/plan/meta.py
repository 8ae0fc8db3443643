"""The model of a config on the meta device: its modules and shapes, without storage."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from tpresearch.config.errors import ConfigError, nearest
from tpresearch.config.imports import imported_class
from tpresearch.config.schema import Dtype, ModelConfig


def meta_model(config: ModelConfig, dtype: Dtype = Dtype.float32) -> nn.Module:
    """The model without storage, its parameters in the dtype in which weights are kept: see `plain_model`."""
    return plain_model(config, dtype, "meta")


def plain_model(config: ModelConfig, dtype: Dtype = Dtype.float32, device: str = "cpu") -> nn.Module:
    """The model as its class makes it, its parameters in the dtype in which weights are kept.

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
    return model.to(weight_dtype(dtype))


def all_settings(config: ModelConfig) -> dict[str, Any]:
    """A model's settings, those included that its config leaves to the class."""
    accepted = inspect.signature(imported_class("model._target_", config.target, nn.Module)).parameters
    defaults = {name: p.default for name, p in accepted.items() if p.default is not inspect.Parameter.empty}
    return {**defaults, **config.args}


def weight_dtype(dtype: Dtype) -> torch.dtype:
    """In which weights are kept. bfloat16 is a matter of computing: its weights are float32."""
    return torch.float64 if dtype is Dtype.float64 else torch.float32
