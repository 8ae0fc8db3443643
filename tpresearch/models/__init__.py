"""Plain PyTorch models, unaware of devices, meshes and sharding, which belong to `parallel/`.

Requirements on a language model: `forward(tokens: [b, s] int64) -> logits [b, s, V]`, and weights
that are drawn by a `reset_parameters` of the module that owns them (like torch's own layers). In-place calls
such as `normal_` and `clamp_` are drawn shard by shard, anything else in full on every rank. Optional:
`reset_buffers()` where buffers hold computed values, `attention_flops_per_token(seq_len)` for MFU, and
`forward(tokens, head=f)`, which returns `f(output_layer, hidden)` instead of the logits, for a loss that
does not need all of them at once.

A network on floats (data=uniform) takes `forward(x: [b, width]) -> [b, ...]`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Head = Callable[[nn.Module, Tensor], Tensor]
"""A function of a model's output layer and its input, [b, s, h], instead of logits."""
