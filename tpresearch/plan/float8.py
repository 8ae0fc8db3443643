"""Which linear layers multiply in float8, and what cannot be trained so."""

from __future__ import annotations

from torch import nn

from tpresearch.config.axes import MeshSizes
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.config.validate import micro_batch_size
from tpresearch.plan.compiler import Plan, local_shape

UNIT = 16
"""What the sizes of a float8 matmul have to be multiples of (cuBLAS, section 1.5: 16 bytes)."""


def float8_layers(model: nn.Module, plan: Plan, cfg: Config, sizes: MeshSizes) -> list[str]:
    """Names of the blocks' linear layers whose weight, as a rank holds it, has sizes that float8 takes.

    Embedding and output layer stay as they are: their rounding costs loss (arXiv 2209.05433, section 4.1), and the loss
    is made of the output layer's weight in chunks.

    Raises:
        ConfigError: where there are none, or where the tokens of a micro-batch are no such size.
    """
    tokens = micro_batch_size(cfg, sizes) * cfg.data.seq_len
    if tokens % UNIT:
        why = f"float8 takes a multiple of {UNIT} tokens at a time, and a micro-batch has {tokens}"
        legal = f"train.micro_batch_size x data.seq_len a multiple of {UNIT}, or train.float8=none"
        raise ConfigError("train.float8", cfg.train.float8, why, legal)
    found = [
        name
        for name, module in model.named_modules()
        if any(name.startswith(f"{block}.") for block in plan.blocks)
        and isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and name != plan.seen.head
        and not any(size % UNIT for size in local_shape(f"{name}.weight", model, plan))
    ]
    if not found:
        why = f"no linear layer in a block of {cfg.model.name} has sizes on a rank that {UNIT} divides"
        legal = "a wider model, fewer tp ranks, or none"
        raise ConfigError("train.float8", cfg.train.float8, why, legal, fix={"train.float8": "none"})
    return found
