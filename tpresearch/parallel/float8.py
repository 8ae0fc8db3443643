"""Linear layers that multiply in float8, by torchao (arXiv 2209.05433): weights, gradients and activations stay bfloat16,
and are scaled and rounded at each matmul, by their greatest value (tensorwise) or that of each row (rowwise)."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Collection

import torch
from torch import nn

from tpresearch.config.choices import Float8
from tpresearch.config.errors import ConfigError
from tpresearch.config.training import TrainConfig

CAPABILITY = {Float8.tensorwise: (8, 9), Float8.rowwise: (9, 0)}
"""The least compute capability that has each kind of matmul."""


def to_float8(model: nn.Module, layers: Collection[str], train: TrainConfig) -> None:
    """Have these layers of a plain model multiply in float8, each with the very parameters that it has.

    Under tensor parallelism the scales are those of whole tensors: their greatest values are reduced over its ranks.
    """
    if not layers:
        return
    before = logging.root.manager.disable
    logging.disable(
        logging.WARNING
    )  # it warns of each library of its own that this machine cannot load: none is used here
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # late: it is optional
    finally:
        logging.disable(before)
    recipe = Float8LinearConfig.from_recipe_name(str(train.float8))
    config = dataclasses.replace(recipe, emulate=train.float8_emulated)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in layers)


def check_float8(train: TrainConfig, device: torch.device) -> None:
    """Refuse a device that cannot train so.

    Raises:
        ConfigError: with what it lacks.
    """
    if train.float8 is not Float8.none and (lack := _lack(train, device)):
        legal = "none on this device, or train.float8_emulated=true to see what it does to a loss"
        raise ConfigError("train.float8", train.float8, lack, legal, fix={"train.float8": "none"})


def _lack(train: TrainConfig, device: torch.device) -> str | None:
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: pip install 'tpresearch[float8]'"
    if train.float8_emulated:
        return None
    if device.type != "cuda":
        return "a CPU has no float8 matmuls"
    needed = CAPABILITY[train.float8]
    if (has := torch.cuda.get_device_capability(device)) < needed:
        return f"it needs a GPU of compute capability {needed[0]}.{needed[1]}, and this one has {has[0]}.{has[1]}"
    return None
