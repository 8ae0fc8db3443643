"""Output layer and cross-entropy in chunks of tokens, so that the logits of all tokens never exist at once.

The gradients are computed in forward, while a chunk's logits exist; backward only scales them. On vocabulary shards each
chunk sends three all-reduces of one number per token (Megatron-LM, arXiv 1909.08053, section 3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate

from tpresearch.config.errors import ConfigError
from tpresearch.data.batches import IGNORE_INDEX
from tpresearch.parallel.gradient_sums import Summing
from tpresearch.parallel.summed_gradients import add_product_


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

    def all_reduce_max(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, dist.ReduceOp.MAX, self.group)
        return values

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        dist.all_reduce(values, group=self.group)
        return values


def chunk_count(tokens: int, most: int) -> int:
    """Number of chunks of at most `most` tokens that a micro-batch is split into; their sizes differ by at most one."""
    return -(-tokens // most)


def gather_tokens(hidden: Tensor, weight: DTensor, layout: Placement) -> Tensor:
    """The hidden states of all tokens on every tp rank. Their gradients are partial: each rank has those of its vocabulary rows.

    hidden: [b, s, h], plain or a DTensor, in `layout` over the mesh of the weight.
    """
    mesh = weight.device_mesh
    if not isinstance(hidden, DTensor):
        hidden = DTensor.from_local(hidden, mesh, [layout], run_check=False)
    return hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk: int,
    scale: float = 1.0,
    compile: bool = False,
    summing: Summing | None = None,
) -> Tensor:
    """The cross-entropy of `hidden @ weight.T`, summed over tokens, in nats and at least float32, times `scale`.

    In bfloat16 the weight's gradient is rounded once per chunk, as matmuls into it are.

    Args:
        hidden: [b, s, h], plain. weight: [V, h], plain or a DTensor sharded over V. targets: [b, s] int64, `IGNORE_INDEX` where
            there is none. chunk: tokens whose logits exist at once. compile: fuse the ops on the logits of a chunk,
            which are then read twice and written once, and never exist in float32.
        summing: the layer of the weight, to whose sum its gradient is added at once (`gradient_sums`), for a loss that
            `backward_from` differentiates.

    Returns: a plain scalar, the same on every tp rank.
    """
    shard = VocabularyShard.of(weight) if isinstance(weight, DTensor) else None
    local = weight.to_local() if isinstance(weight, DTensor) else weight
    if not torch.is_grad_enabled():  # of which autograd tells no function, and it would make gradients
        local, hidden = local.detach(), hidden.detach()
    loss_and_gradient = _compiled_loss_and_gradient if compile else _loss_and_gradient
    flat = hidden.flatten(0, -2), local, targets.flatten()
    return _LinearCrossEntropy.apply(*flat, chunk, scale, shard, loss_and_gradient, summing)


def backward_from(loss: Tensor) -> None:
    """`loss.backward()`, in which gradients that were made with the loss are known to be those of a loss times 1."""
    one = torch.ones_like(loss)
    setattr(one, IS_ONE, True)
    loss.backward(one)


IS_ONE = "is_one"
"""An attribute of a gradient."""


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
        loss_and_gradient: LossFunction,
        summing: Summing | None,
    ) -> Tensor:
        needs_hidden, needs_weight, *_ = ctx.needs_input_grad
        total = summing.gradient_sum if summing and needs_weight else None
        of_hidden = torch.empty_like(hidden) if needs_hidden else None
        of_weight: Tensor | None = None
        loss = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
        count, done = chunk_count(len(hidden), chunk), 0
        for x, target in zip(hidden.tensor_split(count), targets.tensor_split(count), strict=True):
            of_chunk, gradient = loss_and_gradient(
                [F.linear(x, weight)], target, scale, shard, needs_hidden or needs_weight
            )
            loss += of_chunk
            if of_hidden is not None:
                torch.mm(gradient, weight, out=of_hidden[done : done + len(x)])
            if summing and total is not None:
                add_product_(total, gradient.t(), x, summing.begun)
            elif needs_weight and of_weight is None:
                of_weight = gradient.t() @ x
            elif of_weight is not None:
                of_weight.addmm_(gradient.t(), x)
            done += len(x)
            del gradient  # before the next chunk has its own
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.summing = None if total is None else summing
        if ctx.summing:
            ctx.summing.open_losses += 1
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        """In place: a second backward is refused by autograd, since what was saved has changed."""
        is_one = getattr(of_loss, IS_ONE, False)
        if ctx.summing and not is_one:
            why = "the output layer's gradient was added to the step's sum as the loss was made, and what is differentiated is not that loss"
            raise ConfigError(
                "parallel.gradient_accumulation_fusion",
                True,
                why,
                "false, or `backward_from` the loss itself",
            )
        if ctx.summing:
            ctx.summing.open_losses -= 1
        gradients = ctx.saved_tensors
        if not is_one:
            gradients = [g if g is None else g.mul_(of_loss.to(g.dtype)) for g in gradients]
        return *gradients, None, None, None, None, None, None


LossFunction = Callable[[list[Tensor], Tensor, float, VocabularyShard | None, bool], tuple[Tensor, Tensor]]
"""(logits [c, V] or this rank's part of V, targets [c], scale, the shard, whether a gradient is needed) -> the loss of
the chunk times `scale`, and its gradient by the logits, in their dtype. Logits may be overwritten; they come alone in a list, which
is emptied, since a caller may hold its arguments until the end."""


def _loss_and_gradient(
    given: list[Tensor], targets: Tensor, scale: float, shard: VocabularyShard | None, learns: bool
) -> tuple[Tensor, Tensor]:
    """In one float32 copy of the logits, in place of those that are float32 already, and in as few passes as torch's ops allow."""
    logits = given.pop()
    dtype = logits.dtype
    valid, here, index = _target_columns(targets, logits.shape[-1], shard)
    mine = _widen(logits.amax(-1))
    greatest = shard.all_reduce_max(mine.clone()) if shard else mine
    of_target = torch.where(here, logits.gather(-1, index)[:, 0] - greatest, 0)
    softmax = _widen(logits)
    # In place: given narrow logits and a wider dtype, it would make a second wide copy.
    torch.softmax(softmax, -1, out=softmax)
    # A GPU's kernels convert what they write; on a CPU that is slower than a copy.
    place = logits if logits.is_cuda else softmax
    del logits  # which nobody else holds, and may be but a copy's origin
    # The greatest exponential over its share is the sum of all.
    part = (mine - greatest).exp() / softmax.amax(-1)
    total = part
    if shard:
        total, of_target = shard.all_reduce_sum(part.clone()), shard.all_reduce_sum(of_target)
    if learns:
        weight = valid.to(total.dtype) * scale
        factor = (weight * part / total)[:, None]
        there = softmax.gather(-1, index) * factor - torch.where(here, weight, 0)[:, None]
        torch.mul(softmax, factor, out=place).scatter_(-1, index, there.to(place.dtype))
    return torch.where(valid, total.log() - of_target, 0).sum() * scale, place.to(dtype)


def _compiled_loss_and_gradient(
    given: list[Tensor], targets: Tensor, scale: float, shard: VocabularyShard | None, learns: bool
) -> tuple[Tensor, Tensor]:
    """As `_loss_and_gradient`, in fused kernels: one per stretch between two collectives."""
    logits = given.pop()
    valid, here, index = _target_columns(targets, logits.shape[-1], shard)
    greatest = shard.all_reduce_max(_fused(_greatest)(logits)) if shard else None
    greatest, total, of_target = _fused(_totals)(logits, greatest, index[:, 0], here)
    if shard:
        total, of_target = shard.all_reduce_sum(total), shard.all_reduce_sum(of_target)
    if learns:
        weight = valid.to(total.dtype) * scale
        logits = _fused(_gradient)(logits, greatest, total, index[:, 0], here, weight)
    return torch.where(valid, total.log() - of_target, 0).sum() * scale, logits


def _target_columns(
    targets: Tensor, width: int, shard: VocabularyShard | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Which targets count, [c]; which of them are columns here, [c]; and which columns, [c, 1]."""
    valid, index = targets != IGNORE_INDEX, targets - (shard.first if shard else 0)
    here = valid & (index >= 0) & (index < width)
    return valid, here, index.clamp(0, width - 1)[:, None]


@functools.cache
def _fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled, at its first call: the compiler alone takes a second to import. For that call's shapes, then once more for any:
    torch compiles nothing for the ninth shape (2.11 to 2.14), and chunks of several sizes and models share these functions."""
    return torch.compile(function, fullgraph=True)


def _widen(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _greatest(logits: Tensor) -> Tensor:
    return _widen(logits).amax(-1)


def _totals(
    logits: Tensor, greatest: Tensor | None, index: Tensor, here: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The maximum logit of each row, the sum of exponentials relative to it, and the target's logit relative to it: all [c].

    With dims kept, as inductor knows a softmax, of which a GPU's kernel finds maximum and sum in one pass (torch 2.11 and 2.14).
    """
    wide = _widen(logits)
    most = wide.amax(-1, keepdim=True) if greatest is None else greatest[:, None]
    total = (wide - most).exp().sum(-1, keepdim=True)
    above = wide.gather(-1, index[:, None]) - most
    return most[:, 0], total[:, 0], torch.where(here, above[:, 0], 0)


def _gradient(
    logits: Tensor, greatest: Tensor, total: Tensor, index: Tensor, here: Tensor, weight: Tensor
) -> Tensor:
    """weight (softmax - one hot), in the logits' dtype; [c] but for the logits [c, V]."""
    softmax = (_widen(logits) - greatest[:, None]).exp() * (weight / total)[:, None]
    is_target = (torch.arange(logits.shape[-1], device=logits.device) == index[:, None]) & here[:, None]
    return torch.where(is_target, softmax - weight[:, None], softmax).to(logits.dtype)
