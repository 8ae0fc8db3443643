"""Objectives, on whole outputs or on shards of them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Placement
from torch.distributed.tensor.parallel import loss_parallel

from tpresearch.config.choices import Loss
from tpresearch.config.schema import Config
from tpresearch.config.validate import tokens_per_step
from tpresearch.data.batches import IGNORE_INDEX, Batch
from tpresearch.parallel.apply import run_as_forward, unshard
from tpresearch.parallel.gradient_sums import summing_now
from tpresearch.plan.compiler import Plan
from tpresearch.train.cross_entropy import gather_tokens, linear_cross_entropy

Phase = Callable[[str], AbstractContextManager[object]]
"""Marks a part of the step for the observers."""


class Objective(Protocol):
    """The loss of a global batch as a sum over rows, to which ranks and micro-batches each add their part.

    It calls the model itself: an objective that needs the hidden states calls `model(inputs, head=...)`.
    """

    def context(self) -> AbstractContextManager[object]:
        """To be entered around forward and backward."""
        return nullcontext()

    def __call__(self, model: nn.Module, batch: Batch, phase: Phase) -> Tensor:
        """The contribution of these rows to the loss: a plain scalar in at least float32, the same on every rank that has the
        same rows."""
        ...


@dataclass(frozen=True)
class ChunkedCrossEntropy(Objective):
    """The next-token cross-entropy in nats, summed over tokens, times `scale`; computed for a chunk of tokens at a time, so
    that the logits of all never exist at once.

    Attributes:
        head: the name of the model's output layer. chunk: tokens at a time.
        layout: that of the hidden states at that layer, if its weight is sharded over the vocabulary.
        compile: fuse the ops on logits.
    """

    scale: float
    head: str
    chunk: int
    layout: Placement | None
    compile: bool

    def __call__(self, model: nn.Module, batch: Batch, phase: Phase) -> Tensor:
        with phase("forward"):
            hidden = model(batch.inputs, head=lambda _, hidden: hidden)
            layer = unshard(model.get_submodule(self.head))
            weight = layer.get_parameter("weight")
            if self.layout and isinstance(weight, DTensor):
                hidden = gather_tokens(hidden, weight, self.layout)
        with phase("loss"):
            given = weight, batch.targets, self.chunk, self.scale, self.compile, summing_now(layer)
            return run_as_forward(layer, lambda hidden: linear_cross_entropy(hidden, *given), hidden)


@dataclass(frozen=True)
class FullCrossEntropy(Objective):
    """The next-token cross-entropy in nats, summed over tokens, times `scale`; computed from all logits of a micro-batch at once.

    Attributes:
        is_sharded: logits are a DTensor, sharded over the vocabulary; forward and backward of the cross-entropy then work
            on vocabulary shards (Megatron-LM, arXiv 1909.08053, section 3).
    """

    scale: float
    is_sharded: bool

    def context(self) -> AbstractContextManager[object]:
        return loss_parallel() if self.is_sharded else nullcontext()

    def __call__(self, model: nn.Module, batch: Batch, phase: Phase) -> Tensor:
        with phase("forward"):
            logits = model(batch.inputs)
        with phase("loss"):
            return summed_cross_entropy(logits, batch.targets) * self.scale


@dataclass(frozen=True)
class SumOfOutputs(Objective):
    """The plain sum of all outputs, as in the tutorial's scripts: no targets and no minimum."""

    def __call__(self, model: nn.Module, batch: Batch, phase: Phase) -> Tensor:
        with phase("forward"):
            output = model(batch.inputs)
        with phase("loss"):
            return sum_outputs(output)


def build_objective(cfg: Config, plan: Plan) -> Objective:
    """The configured objective; for tokens the mean over the global batch, over all ranks and micro-batches."""
    if cfg.train.loss is Loss.sum:
        return SumOfOutputs()
    return build_token_loss(cfg, plan, 1 / tokens_per_step(cfg))


def build_token_loss(cfg: Config, plan: Plan, scale: float = 1.0) -> Objective:
    """The cross-entropy in chunks, if train.loss_chunk is set and the output layer's rule allows it; otherwise of all logits."""
    if cfg.train.loss_chunk is None or not plan.chunked_head:
        return FullCrossEntropy(scale, plan.loss_parallel)
    rule = plan.rules.get(plan.chunked_head)
    layout = rule.src[0] if rule else None
    return ChunkedCrossEntropy(scale, plan.chunked_head, cfg.train.loss_chunk, layout, cfg.parallel.compile)


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss summed over tokens, in nats and at least float32; sharded logits send 3 all-reduces of b*s numbers.

    logits: [b, s, V], plain or a DTensor sharded over V. targets: [b, s] int64, `IGNORE_INDEX` where there is none.
    Returns: a plain scalar, the same on every tp rank.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return loss.to_local() if isinstance(loss, DTensor) else loss


def sum_outputs(output: Tensor) -> Tensor:
    """The sum of all elements, in at least float32; of a sharded DTensor each rank adds up its part, and one
    all-reduce of one number adds those up. Nothing is gathered, forward or backward.

    Returns: a plain scalar, the same on every tp rank.
    """
    local = output.to_local() if isinstance(output, DTensor) else output
    part = local.sum(dtype=torch.promote_types(local.dtype, torch.float32))
    if not isinstance(output, DTensor):
        return part
    return DTensor.from_local(part, output.device_mesh, [Partial()]).full_tensor()
