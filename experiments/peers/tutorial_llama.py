"""The tutorial's script for a Llama2 under TP/SP and FSDP, mended: a loss in place of the sum of all outputs, gradients set
to zero, the same weights and batches as the others, and `fully_shard` for the whole model, since its FSDP takes no CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from tpresearch.models.llama2 import Llama2


def train(
    plan: str,
    dp: int,
    tp: int,
    sizes: dict[str, Any],
    weights: dict[str, Tensor],
    batches: Callable[[int], tuple[Tensor, Tensor]],
    adamw: dict[str, Any],
    clip: float,
) -> Iterator[float]:
    mesh = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    model = Llama2(**sizes)
    model.load_state_dict(weights)
    if tp > 1:
        ends: dict[str, ParallelStyle] = {
            "tok_embeddings": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        }
        parallelize_module(model, mesh["tp"], ends)
        for block in model.layers:
            layer_tp_plan: dict[str, ParallelStyle] = {
                "attention_norm": SequenceParallel(),
                "attention": PrepareModuleInput(
                    input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
                ),
                "attention.wq": ColwiseParallel(),
                "attention.wk": ColwiseParallel(),
                "attention.wv": ColwiseParallel(),
                "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
                "ffn_norm": SequenceParallel(),
                "feed_forward": PrepareModuleInput(
                    input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
                ),
                "feed_forward.w1": ColwiseParallel(),
                "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
                "feed_forward.w3": ColwiseParallel(),
            }
            parallelize_module(block, mesh["tp"], layer_tp_plan)
    sharded_model: Any = fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(sharded_model.parameters(), **adamw)
    for step in range(10**6):
        inputs, targets = batches(step)
        output = sharded_model(inputs)
        loss = F.cross_entropy(output.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(sharded_model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
