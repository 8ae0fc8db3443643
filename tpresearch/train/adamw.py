"""AdamW (arXiv 1711.05101) as torch's fused kernel, or as an update whose moments have a dtype of their own and that can be compiled."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpresearch.parallel.weights import local_part


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
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        moment_dtype: torch.dtype | None,
        compile: bool,
        copies: Mapping[nn.Parameter, Tensor],
        **settings: Any,
    ) -> None:
        super().__init__(groups, fused=True, **settings)
        self._moment_dtype, self._compile = moment_dtype, compile
        self._copies = copies
        from tpresearch.train.adamw_op import adamw_  # late: registering an op takes 20 ms

        self._adamw_ = adamw_

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
        state, copy = self.state[parameter], self._copies.get(parameter)
        assert parameter.grad is not None
        self._adamw_(
            *(
                local_part(t)
                for t in (parameter.detach(), parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            ),
            None if copy is None else local_part(copy.detach()),
            state["step"],
            self.grad_scale,
            self.found_inf,
            group["lr"],
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            self._compile,
        )
