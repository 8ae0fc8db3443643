"""Linear layers that multiply in float8, by torchao (arXiv 2209.05433): weights, gradients and activations stay bfloat16,
and are scaled and rounded at each matmul, by their absolute maximum (tensorwise) or that of each row (rowwise). Which layers do,
and what cannot be trained so."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
from collections.abc import Collection

import torch
from torch import nn

from tpresearch.config.axes import MeshSizes
from tpresearch.config.choices import Float8
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.config.training import TrainConfig
from tpresearch.config.validate import micro_batch_size
from tpresearch.plan.compiler import Plan, tp_local_shape, unit_of
from tpresearch.plan.rules import runs_as

MIN_CAPABILITY = {Float8.tensorwise: (8, 9), Float8.rowwise: (9, 0)}
"""Minimum compute capability of each kind of matmul."""
SIZE_MULTIPLE = 16
"""The sizes of a float8 matmul must be multiples of this (cuBLAS, section 1.5: 16 bytes)."""


def to_float8(model: nn.Module, layers: Collection[str], train: TrainConfig) -> None:
    """Make these layers of a plain model multiply in float8; each keeps its parameters.

    Under tensor parallelism the scales are those of full tensors: their maxima are reduced over the tp ranks.
    """
    if not layers:
        return
    before = logging.root.manager.disable
    # It warns of each of its libraries that this machine cannot load: none is used here.
    logging.disable(logging.WARNING)
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # late: it is optional
    finally:
        logging.disable(before)
    recipe = Float8LinearConfig.from_recipe_name(str(train.float8))
    config = dataclasses.replace(recipe, emulate=train.float8_emulated)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda _, name: name in layers)


def check_float8(train: TrainConfig, device: torch.device) -> None:
    """Refuse a device that cannot train so."""
    if train.float8 is not Float8.none and (missing := _missing_support(train, device)):
        legal = "none on this device, or train.float8_emulated=true to see its effect on the loss"
        raise ConfigError("train.float8", train.float8, missing, legal, fix={"train.float8": "none"})


def _missing_support(train: TrainConfig, device: torch.device) -> str | None:
    if importlib.util.find_spec("torchao") is None:
        return "torchao is not installed: pip install 'tpresearch[float8]'"
    if train.float8_emulated:
        return None
    if device.type != "cuda":
        return "a CPU has no float8 matmuls"
    needed = MIN_CAPABILITY[train.float8]
    if (has := torch.cuda.get_device_capability(device)) < needed:
        return f"it needs a GPU of compute capability {needed[0]}.{needed[1]}, and this one has {has[0]}.{has[1]}"
    return None


def float8_layers(model: nn.Module, plan: Plan, cfg: Config, sizes: MeshSizes) -> list[str]:
    """Names of the blocks' linear layers whose weight, as a rank holds it, has sizes that float8 takes.

    Embedding and output layer stay as they are: their rounding costs loss (arXiv 2209.05433, section 4.1), and the loss
    is made of the output layer's weight in chunks.

    Raises:
        ConfigError: if there are none, or if the number of tokens of a micro-batch is not such a multiple.
    """
    tokens = micro_batch_size(cfg, sizes) * cfg.data.seq_len
    if tokens % SIZE_MULTIPLE:
        why = f"float8 takes a multiple of {SIZE_MULTIPLE} tokens at a time, and a micro-batch has {tokens}"
        legal = f"train.micro_batch_size x data.seq_len a multiple of {SIZE_MULTIPLE}, or train.float8=none"
        raise ConfigError("train.float8", cfg.train.float8, why, legal)
    found = [
        name
        for name, module in model.named_modules()
        if unit_of(name, plan.blocks)
        and runs_as(module, nn.Linear)
        and name != plan.probe.head
        and not any(size % SIZE_MULTIPLE for size in tp_local_shape(f"{name}.weight", model, plan))
    ]
    if not found:
        why = (
            f"no linear layer in a block of {cfg.model.name} has sizes on a rank that {SIZE_MULTIPLE} divides"
        )
        legal = "a wider model, fewer tp ranks, or none"
        raise ConfigError("train.float8", cfg.train.float8, why, legal, fix={"train.float8": "none"})
    return found
