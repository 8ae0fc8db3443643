"""Output layer and cross-entropy of a few tokens at a time, so that the logits of all of them are never there at once.

The gradients are made in forward, where the logits of a chunk are; backward only scales them. On vocabulary shards each
chunk sends three all-reduces of a number per token (Megatron-LM, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from tpresearch.data.batches import IGNORED


@dataclass(frozen=True)
class VocabularyShard:
    """The rows of an output layer's weight that a rank holds, and the ranks that hold the others."""

    first: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, weight: DTensor) -> VocabularyShard:
        mesh = weight.device_mesh
        rows = -(-weight.shape[0] // mesh.size())  # as torch cuts: the last shard may be smaller
        return cls(min(mesh.get_local_rank() * rows, weight.shape[0]), mesh.get_group())

    def greatest(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.MAX, self.group)
        return values

    def total(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values


def chunks(tokens: int, most: int) -> int:
    """Into how many chunks of at most `most` tokens a micro-batch is cut, each as large as the others or one smaller."""
    return -(-tokens // most)


def whole_tokens(hidden: Tensor, weight: DTensor, layout: Placement) -> Tensor:
    """The hidden states of all tokens on every tp rank. Their gradients there are partial, by each rank's rows.

    hidden: [b, s, h], plain or a DTensor, in `layout` over the mesh of the weight.
    """
    mesh = weight.device_mesh
    if not isinstance(hidden, DTensor):
        hidden = DTensor.from_local(hidden, mesh, [layout], run_check=False)
    return hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, scale: float = 1.0
) -> Tensor:
    """The cross-entropy of `hidden @ weight.T`, summed over tokens, in nats and at least float32, times `scale`.

    In bfloat16 the weight's gradient is rounded once per chunk, as matmuls into it are.

    Args:
        hidden: [b, s, h], plain. weight: [V, h], plain or a DTensor sharded over V. targets: [b, s] int64, `IGNORED` where
            there is none. chunk: tokens whose logits are there at once.

    Returns: a plain scalar, the same on every tp rank.
    """
    shard = VocabularyShard.of(weight) if isinstance(weight, DTensor) else None
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    return _LinearCrossEntropy.apply(hidden.flatten(0, -2), local, targets.flatten(), chunk, scale, shard)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int,
        scale: float,
        shard: VocabularyShard | None,
    ) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight: Tensor | None = None
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        count, done = chunks(len(hidden), chunk), 0
        for x, target in zip(hidden.tensor_split(count), targets.tensor_split(count), strict=True):
            logits = F.linear(x, weight).to(loss.dtype)
            loss += _consume(logits, target, scale, shard, needs_hidden or needs_weight)
            gradient = logits.to(x.dtype)
            if of_hidden is not None:
                torch.mm(gradient, weight, out=of_hidden[done : done + len(x)])
            if needs_weight and of_weight is None:
                of_weight = gradient.t() @ x
            elif of_weight is not None:
                of_weight.addmm_(gradient.t(), x)
            done += len(x)
            del logits, gradient  # before the next chunk has its own
        ctx.save_for_backward(of_hidden, of_weight)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:
        """In place: a second backward is refused by autograd, since what was saved has changed."""
        of_hidden, of_weight = (g if g is None else g.mul_(of_loss.to(g.dtype)) for g in ctx.saved_tensors)
        return of_hidden, of_weight, None, None, None, None


def _consume(
    logits: Tensor, targets: Tensor, scale: float, shard: VocabularyShard | None, learns: bool
) -> Tensor:
    """The loss of a chunk, times `scale`; its gradient takes the place of the logits where something learns from it.

    logits: [c, V] or this rank's part of V. targets: [c].
    """
    valid, index = targets != IGNORED, targets - (shard.first if shard else 0)
    here = valid & (index >= 0) & (index < logits.shape[-1])
    index = index.clamp(0, logits.shape[-1] - 1)[:, None]
    greatest = logits.amax(-1)
    logits.sub_((shard.greatest(greatest) if shard else greatest)[:, None])
    of_target = torch.where(here, logits.gather(-1, index)[:, 0], 0)
    total = logits.exp_().sum(-1)
    if shard:
        total, of_target = shard.total(total), shard.total(of_target)
    if learns:
        weight = valid.to(logits.dtype) * scale
        logits.mul_((weight / total)[:, None])
        logits.scatter_add_(-1, index, torch.where(here, -weight, 0)[:, None])
    return torch.where(valid, total.log() - of_target, 0).sum() * scale
