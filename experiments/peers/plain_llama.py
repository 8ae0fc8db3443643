"""A loop in torch alone around our plain Llama2, in bfloat16 on one device; its rotary table stays in float32, as ours does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpresearch.models.llama2 import Llama2


def train(
    sizes: dict[str, Any],
    weights: dict[str, Tensor],
    batches: Callable[[int], tuple[Tensor, Tensor]],
    adamw: dict[str, Any],
    clip: float,
    device: str,
    compiled: Callable[[Any], Any],
) -> Iterator[float]:
    with torch.device(device):
        model = Llama2(**sizes)
    model.load_state_dict(
        {name: weight.to(device, copy=True) for name, weight in weights.items()}, assign=True
    )
    model = compiled(model)
    optimizer = torch.optim.AdamW(model.parameters(), **adamw)
    for step in range(10**6):
        inputs, targets = batches(step)
        loss = F.cross_entropy(model(inputs).float().flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
