"""AdamW's update of one tensor as a custom op, plain or compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor


@torch.library.custom_op("tpresearch::adamw_", mutates_args=("weight", "exp_avg", "exp_avg_sq", "copy"))
def adamw_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    count: Tensor,
    divisor: Tensor | None,
    skips: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    compile: bool,
) -> None:
    """One tensor's update in place, as one op for whoever records ops.

    Args:
        copy: set to the new weight. count: of updates, with this one, a scalar. divisor: of the gradient, a scalar.
            skips: a scalar, 1.0 to change nothing. compile: where all that is written is contiguous.
    """
    if not weight.numel():
        return
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rate, decay = (torch.full((), x, dtype=dtype, device=weight.device) for x in (lr, lr * weight_decay))
    if compile and all(t is None or t.is_contiguous() for t in (weight, exp_avg, exp_avg_sq, copy)):
        tensors = *_in_rows((weight, gradient, exp_avg, exp_avg_sq, copy)), count, divisor, skips, rate, decay
        kinds = *(t if t is None else t.dtype for t in tensors), weight.numel() % ROW == 0
        _compiled_update(kinds, beta1, beta2, eps)(*tensors)
    else:
        scalars = count, divisor, skips, rate, decay
        _update(beta1, beta2, eps, weight, gradient, exp_avg, exp_avg_sq, copy, *scalars)


ROW = 1024
"""Elements."""


def _in_rows(tensors: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Views for one graph whatever the shape: rows of a fixed length, so that loads are known to be aligned, or flat.

    A gradient that is not contiguous is copied; what is written is contiguous.
    """
    found = []
    for tensor in tensors:
        if tensor is not None:
            tensor = tensor.contiguous().view((-1, ROW) if tensor.numel() % ROW == 0 else (-1,))
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        found.append(tensor)
    return found


@functools.cache
def _compiled_update(kinds: tuple[torch.dtype | bool | None, ...], *constants: float) -> Callable[..., None]:
    """The update for tensors of these dtypes, in rows or not: two graphs, one of them for a single row or element."""

    def update(*tensors: Tensor | None) -> None:
        _update(*constants, *tensors)  # pyrefly: ignore[bad-argument-type]

    # Of its own, since dynamo refuses a ninth graph of one code object, whatever functions it is the code of.
    update.__code__ = update.__code__.replace()
    return torch.compile(update, fullgraph=True)


def _update(
    beta1: float,
    beta2: float,
    eps: float,
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    count: Tensor,
    divisor: Tensor | None,
    skips: Tensor | None,
    rate: Tensor,
    decay: Tensor,
) -> None:
    dtype = rate.dtype
    old = weight.to(dtype), exp_avg.to(dtype), exp_avg_sq.to(dtype)
    g = gradient.to(dtype) if divisor is None else gradient.to(dtype) / divisor
    mean = old[1] + (1 - beta1) * (g - old[1])
    square = beta2 * old[2] + (1 - beta2) * g * g
    steps = count.to(dtype)
    unbiased = mean / (1 - beta1**steps)
    deviation = (square / (1 - beta2**steps)).sqrt()
    new = old[0] * (1 - decay) - rate * unbiased / (deviation + eps)
    if skips is not None:
        new, mean, square = (
            torch.where(skips > 0, a, b) for a, b in zip(old, (new, mean, square), strict=True)
        )
    weight.copy_(new)
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)
    if copy is not None:
        copy.copy_(new)
