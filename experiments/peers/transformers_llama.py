"""A user's script for transformers and accelerate: LlamaForCausalLM with the plans that it ships (base_model_tp_plan and
_fsdp_plan), from a folder on disk, float32 on CPUs unless told otherwise. DDP and a single process (plan `none`) are accelerate's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.distributed import DistributedConfig


def train(
    plan: str,
    dp: int,
    tp: int,
    folder: Path,
    batches: Callable[[int], tuple[Tensor, Tensor]],
    adamw: dict[str, Any],
    clip: float,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: Callable[[Any], Any] = lambda model: model,
) -> Iterator[float]:
    sharded = None if plan in ("none", "ddp") else DistributedConfig(tp_size=tp, fsdp_size=dp)
    model = LlamaForCausalLM.from_pretrained(folder, distributed_config=sharded, dtype=dtype)
    by_mesh: dict[object, list[nn.Parameter]] = {}  # neither the fused AdamW nor torch's norm takes a mixture
    for parameter in model.parameters():
        by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    optimizer = torch.optim.AdamW([{"params": group} for group in by_mesh.values()], **adamw)
    if sharded is None:
        model, optimizer = Accelerator(cpu=device == "cpu").prepare(compiled(model), optimizer)
    model.train()
    for step in range(10**6):
        inputs, targets = batches(step)
        loss = model(inputs, labels=targets, shift_labels=targets, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip) if plan == "none" else clip_(
            list(by_mesh.values()), clip
        )
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


@torch.no_grad()
def clip_(groups: list[list[nn.Parameter]], most: float) -> None:
    gradients = [[p.grad for p in group if p.grad is not None] for group in groups]
    norms = [nn.utils.get_total_norm(group) for group in gradients]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for group in gradients:
        torch._foreach_mul_(group, (most / (norm + 1e-6)).clamp(max=1.0).item())
