"""What a step minimises, on whole outputs or on shards of them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor.parallel import loss_parallel

from tpresearch.config.schema import Loss
from tpresearch.data import IGNORED, Batch


@dataclass(frozen=True)
class Objective:
    """The loss of a global batch as a sum over rows, so that ranks and micro-batches each add their part.

    Attributes:
        loss: the mean cross-entropy of each next token, or the plain sum of all outputs.
        split: the output comes as a DTensor that is split over tp.
        tokens: valid targets in the whole global batch, over all ranks and micro-batches.
        dtype: in which rows of numbers are given to the model.
    """

    loss: Loss
    split: bool
    tokens: int
    dtype: torch.dtype

    def context(self) -> AbstractContextManager[None]:
        """To be entered around forward and backward."""
        return loss_context(self.split and self.loss is Loss.next_token)

    def inputs(self, batch: Batch) -> Tensor:
        """What the model is given: rows of numbers [b, width] in its dtype, or tokens [b, s]."""
        return batch.inputs.to(self.dtype) if batch.inputs.is_floating_point() else batch.inputs

    def part(self, output: Tensor, targets: Tensor) -> Tensor:
        """What these rows add to the loss: a plain scalar, the same on every tp rank."""
        if self.loss is Loss.sum:
            return summed(output)
        return summed_cross_entropy(output, targets) / self.tokens


def loss_context(vocab_parallel: bool) -> AbstractContextManager[None]:
    """Inside it, forward and backward of the cross-entropy work on vocabulary shards (Megatron-LM, section 3)."""
    return loss_parallel() if vocab_parallel else nullcontext()


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss summed over tokens, in nats and at least float32; sharded logits send 3 all-reduces of b*s numbers.

    logits: [b, s, V], plain or a DTensor sharded over V. targets: [b, s] int64, `IGNORED` where there is none.
    Returns: a plain scalar, the same on every tp rank.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss.to_local() if isinstance(loss, DTensor) else loss


def summed(output: Tensor) -> Tensor:
    """The sum of all elements, in at least float32; of a DTensor that is split, each rank adds up its part and one
    all-reduce of one number adds those up. Nothing is gathered, forward or backward.

    Returns: a plain scalar, the same on every tp rank.
    """
    local = output.to_local() if isinstance(output, DTensor) else output
    part = local.sum(dtype=torch.promote_types(local.dtype, torch.float32))
    if not isinstance(output, DTensor):
        return part
    return DTensor.from_local(part, output.device_mesh, [Partial()]).full_tensor()
