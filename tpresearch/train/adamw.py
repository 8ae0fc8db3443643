"""AdamW (arXiv 1711.05101) as torch's fused kernel, or as an op whose moments have a dtype of their own and that can be compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpresearch.parallel.weights import local_part
from tpresearch.train.halves import join, split


class AdamW(torch.optim.AdamW):
    """Fused AdamW that reads from the device the divisor of gradients, and whether to skip an update.

    torch.amp.GradScaler sets the same two (seen in torch 2.11 to 2.14).
    """

    grad_scale: Tensor | None = None
    """A float32 scalar."""
    found_inf: Tensor | None = None
    """A float32 scalar: 1.0 leaves weights, moments and the count of steps as they are."""


class ElementwiseAdamW(AdamW):
    """AdamW, tensor by tensor in one pass over memory: computed in at least float32, and rounded where it is stored.

    On an H200 torch's fused kernel moves 2.3 of 4.8 TB/s in bfloat16, the compiled one 4.1 (experiments/gpu); but each tensor takes
    a call from Python (about 60 us), so that it is for weights of millions of elements.

    Args:
        moment_dtype: of exp_avg and exp_avg_sq; None for that of the weight. compile: by torch.compile; otherwise in plain
            torch, which holds float32 copies of one tensor at a time.
        copies: by weight, a tensor that is set to its rounded new value in the same pass.
        remainders: by weight, this rank's part of what the copy lacks. These two are then read and set, and the weight is not,
            which may have no values.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        moment_dtype: torch.dtype | None,
        compile: bool,
        copies: Mapping[nn.Parameter, Tensor],
        remainders: Mapping[nn.Parameter, Tensor],
        **settings: Any,
    ) -> None:
        super().__init__(groups, fused=True, **settings)
        self._moment_dtype, self._compile = moment_dtype, compile
        self._copies, self._remainders = copies, remainders

    def __getstate__(self) -> dict[str, Any]:
        """For a deep copy: torch's own leaves out what a subclass has."""
        own = ("_moment_dtype", "_compile", "_copies", "_remainders")
        return super().__getstate__() | {name: vars(self)[name] for name in own}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Update every weight that has a gradient. There is no closure to call."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in trained:
                if not self.state[parameter]:
                    self._start(parameter)
            counts = [self.state[parameter]["step"] for parameter in trained]
            if counts:
                # A list: torch would read a single tensor, and wait for it (2.11 and 2.13).
                added = 1.0 if self.found_inf is None else [1 - self.found_inf] * len(counts)
                torch._foreach_add_(counts, added)
            for parameter in trained:
                self._update(parameter, group)

    def _start(self, parameter: nn.Parameter) -> None:
        """The state that torch's fused AdamW has, so that a checkpoint is of either."""
        zeros = functools.partial(torch.zeros_like, parameter, dtype=self._moment_dtype)
        count = torch.zeros((), dtype=torch.float32, device=parameter.device)
        self.state[parameter] |= {"step": count, "exp_avg": zeros(), "exp_avg_sq": zeros()}

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state, remainder = self.state[parameter], self._remainders.get(parameter)
        weight, copy = parameter, self._copies.get(parameter)
        if copy is not None and remainder is not None:
            weight, copy = copy, None
        assert parameter.grad is not None
        adamw_(
            *(local_part(t) for t in (weight, parameter.grad, state["exp_avg"], state["exp_avg_sq"])),
            None if copy is None else local_part(copy),
            remainder,
            state["step"],
            self.grad_scale,
            self.found_inf,
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            self._compile,
        )


@torch.library.custom_op(
    "tpresearch::adamw_", mutates_args=("weight", "exp_avg", "exp_avg_sq", "copy", "remainder")
)
def adamw_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    remainder: Tensor | None,
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
        copy: set to the new weight. remainder: of a weight in float32, of which `weight` is the bfloat16 half (`halves.py`).
            count: of updates, with this one, a scalar. divisor: of the gradient, a scalar. skips: a scalar, 1.0 to change
            nothing. compile: where all that is written is contiguous.
    """
    if not weight.numel():
        return
    dtype = torch.promote_types(weight.dtype, torch.float32)
    rate, decay = (torch.full((), x, dtype=dtype, device=weight.device) for x in (lr, lr * weight_decay))
    if remainder is not None:
        weight = weight.view(torch.int16)
    written = (weight, exp_avg, exp_avg_sq, copy, remainder)
    if compile and all(t is None or t.is_contiguous() for t in written):
        rows = _in_rows((weight, gradient, exp_avg, exp_avg_sq, copy, remainder))
        tensors = *rows, count, divisor, skips, rate, decay
        kinds = *(t if t is None else t.dtype for t in tensors), weight.numel() % ROW == 0
        _compiled_update(kinds, beta1, beta2, eps)(*tensors)
    else:
        scalars = count, divisor, skips, rate, decay
        tensors = weight, gradient, exp_avg, exp_avg_sq, copy, remainder
        _update_tensor(beta1, beta2, eps, *tensors, *scalars)


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
        _update_tensor(*constants, *tensors)  # pyrefly: ignore[bad-argument-type]

    # Of its own, since dynamo refuses a ninth graph of one code object, whatever functions it is the code of.
    update.__code__ = update.__code__.replace()
    return torch.compile(update, fullgraph=True)


def _update_tensor(
    beta1: float,
    beta2: float,
    eps: float,
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    copy: Tensor | None,
    remainder: Tensor | None,
    count: Tensor,
    divisor: Tensor | None,
    skips: Tensor | None,
    rate: Tensor,
    decay: Tensor,
) -> None:
    dtype = rate.dtype
    old_weight = weight.to(dtype) if remainder is None else join(weight, remainder)
    old = old_weight, exp_avg.to(dtype), exp_avg_sq.to(dtype)
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
    if remainder is None:
        weight.copy_(new)
    else:
        upper, lower = split(new)
        weight.copy_(upper)
        remainder.copy_(lower)
    exp_avg.copy_(mean)
    exp_avg_sq.copy_(square)
    if copy is not None:
        copy.copy_(new)
