"""A user's script for Lightning Fabric: the plan of its documented 2D example of a Llama (TP/SP with FSDP2), float32 on CPUs unless told otherwise.

DDP is Fabric's own strategy, with which a user writes no `parallelize`; nor does a single process (plan `none`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

from tpresearch.models.llama2 import Llama2

ENDS: dict[str, ParallelStyle] = {
    "tok_embeddings": RowwiseParallel(input_layouts=Replicate()),
    "layers.0": PrepareModuleInput(
        input_layouts=(Replicate(), None), desired_input_layouts=(Shard(1), None), use_local_output=True
    ),
    "norm": SequenceParallel(),
    "output": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}
BLOCK: dict[str, ParallelStyle] = {
    "attention_norm": SequenceParallel(),
    "attention": PrepareModuleInput(
        input_layouts=(Shard(1), None), desired_input_layouts=(Replicate(), None)
    ),
    "attention.wq": ColwiseParallel(),
    "attention.wk": ColwiseParallel(),
    "attention.wv": ColwiseParallel(),
    "attention.wo": RowwiseParallel(output_layouts=Shard(1)),
    "ffn_norm": SequenceParallel(),
    "feed_forward": PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)),
    "feed_forward.w1": ColwiseParallel(),
    "feed_forward.w2": RowwiseParallel(output_layouts=Shard(1)),
    "feed_forward.w3": ColwiseParallel(),
}


def parallelize(model: Llama2, mesh: DeviceMesh) -> Llama2:
    data, tensor = mesh["data_parallel"], mesh["tensor_parallel"]
    if tensor.size() > 1:
        parallelize_module(model, tensor, ENDS)
        for block in model.layers:
            parallelize_module(block, tensor, BLOCK)
    if data.size() > 1:
        for block in model.layers:
            fully_shard(block, mesh=data, reshard_after_forward=block is not model.layers[-1])
        fully_shard(model, mesh=data)
    return model


def train(
    plan: str,
    dp: int,
    tp: int,
    sizes: dict[str, Any],
    weights: dict[str, Tensor],
    batches: Callable[[int], tuple[Tensor, Tensor]],
    adamw: dict[str, Any],
    clip: float,
    device: str = "cpu",
    precision: Any = "32-true",
    compiled: Callable[[Any], Any] = lambda model: model,
) -> Iterator[float]:
    strategy = {"none": "auto", "ddp": DDPStrategy()}.get(plan) or ModelParallelStrategy(parallelize, dp, tp)
    fabric = Fabric(accelerator=device, devices=dp * tp, strategy=strategy, precision=precision)
    fabric.launch()
    with fabric.init_module():
        model = Llama2(**sizes)
    model.load_state_dict(weights)
    model = fabric.setup(compiled(model))
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), **adamw))
    for step in range(10**6):
        inputs, targets = batches(step)
        output = model(inputs)
        with loss_parallel():
            loss = F.cross_entropy(output.flatten(0, 1), targets.flatten())
        fabric.backward(loss)
        fabric.clip_gradients(model, optimizer, max_norm=clip)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()
