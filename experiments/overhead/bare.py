"""A hand-written training loop for one model on one mesh, without the framework.

Only the model class and the batches are the framework's. Each plan is what torch's tutorials do for it, with the
same optimizer, schedule, clipping and loss as the config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from tpresearch.data.batches import Batch
from tpresearch.models.llama2 import Llama2


def tensor_plan(sequence: bool) -> dict[str, ParallelStyle]:
    """Between blocks activations are replicated, or sharded along the sequence."""
    between = Shard(1) if sequence else Replicate()
    attention: Any = {"input_layouts": (between, None), "desired_input_layouts": (Replicate(), None)}
    plan: dict[str, ParallelStyle] = {
        "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "layers.*.attention": PrepareModuleInput(**attention),
        "layers.*.attention.w[qkv]": ColwiseParallel(),
        "layers.*.attention.wo": RowwiseParallel(output_layouts=between),
        "layers.*.feed_forward": PrepareModuleInput(
            input_layouts=(between,), desired_input_layouts=(Replicate(),)
        ),
        "layers.*.feed_forward.w[13]": ColwiseParallel(),
        "layers.*.feed_forward.w2": RowwiseParallel(output_layouts=between),
        "output": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    return plan | dict.fromkeys(("layers.*.*_norm", "norm"), SequenceParallel()) if sequence else plan


def bare_loop(
    plan: str,
    replicas: int,
    shards: int,
    tp: int,
    model_args: dict[str, Any],
    weights: list[Tensor] | None,
    batch: Callable[[int], Batch],
    steps: int,
    lr: float,
    warmup_steps: int,
    clip: float,
) -> Iterator[float]:
    """Train, and after each step yield this rank's loss, as a hand-written loop prints it.

    Args:
        weights: this rank's shards of the initial weights, in the order of `model.parameters()`; None draws some.
        batch: this rank's inputs and targets of a step.
    """
    with torch.device("meta"):
        model = Llama2(**model_args)
    mesh = init_device_mesh("cpu", (replicas, shards, tp), mesh_dim_names=("replicate", "shard", "tp"))
    if tp > 1:
        parallelize_module(model, mesh["tp"], tensor_plan(sequence=plan != "tp"))
    if shards > 1:
        data = mesh["replicate", "shard"] if replicas > 1 else mesh["shard"]
        for layer in model.layers:
            fully_shard(layer, mesh=data)
        fully_shard(model, mesh=data)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            local.copy_(weights[index]) if weights else local.normal_(std=0.02)
    model.reset_buffers()

    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        done = (step - warmup_steps) / max(steps - warmup_steps, 1)
        return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    forward = nn.parallel.DistributedDataParallel(model) if plan == "ddp" else model
    for step in range(steps):
        inputs, targets = batch(step)
        if tp > 1:
            with loss_parallel():
                loss = F.cross_entropy(forward(inputs).flatten(0, 1), targets.flatten())
                loss.backward()
        else:
            loss = F.cross_entropy(forward(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
        if plan == "tp":
            clip_mixed(model, clip)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield (loss.to_local() if isinstance(loss, DTensor) else loss).item()


def clip_mixed(model: nn.Module, greatest: float) -> None:
    """torch's clip_grad_norm_ refuses DTensors beside plain tensors, which is what tp leaves: by hand then."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    plain = [g for g in gradients if not isinstance(g, DTensor)]
    norm = nn.utils.get_total_norm(sharded)
    assert isinstance(norm, DTensor)
    norms = [norm.full_tensor(), nn.utils.get_total_norm(plain)]
    scale = (greatest / (torch.stack(norms).norm() + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], scale)
