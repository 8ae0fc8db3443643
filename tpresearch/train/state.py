"""The state that a run's steps change: all that a checkpoint must hold."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from tpresearch.parallel.gradient_sums import GradientSums
from tpresearch.parallel.reducer import GradientReducer
from tpresearch.parallel.weights import WeightSource, local_part
from tpresearch.train.halves import join, split


class MasterWeights:
    """Float32 master weights that the optimizer updates; the model computes with bfloat16 copies: mixed precision (arXiv
    1710.03740, section 3.1) where nothing is sharded by FSDP, which has its own.

    A gradient is added to its master's, in float32, as soon as backward has it, and dropped: per micro-batch that moves
    10 bytes per parameter, where `fully_shard` over one rank copies 42 to 54.

    Where they are split, a master has its values only inside `whole`, as what FSDP gathers has only around its use; elsewhere its
    copy and its remainder are what it is, to the bit (see `halves.py`), in 4 bytes per parameter instead of 6. It still has its
    shape, dtype and gradient; it reads as NaN, and torch refuses to set it.

    Args:
        model: its parameters, in float32, become the masters; it is left with bfloat16 copies in their place.
        splits: whether they are split.
    """

    def __init__(self, model: nn.Module, splits: bool = False) -> None:
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        self.copies: dict[nn.Parameter, nn.Parameter] = {}
        """By master weight."""
        self.remainders: dict[nn.Parameter, Tensor] = {}
        """By master weight that is split now, this rank's part of what its copy lacks, in int16."""
        for module in model.modules():
            for key, master in module._parameters.items():  # a tied one at each of its places
                if master is not None and master.is_floating_point():
                    if master not in self.copies:
                        copied = master.detach().to(torch.bfloat16)
                        self.copies[master] = nn.Parameter(copied, master.requires_grad)
                        if splits:
                            self._split(master)
                    self._places.append((module, key, master, self.copies[master]))
        self._masters = {copy: master for master, copy in self.copies.items()}
        self._swap(copies=True)
        self._register_hooks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Of a deep copy, whose parameters have no hooks."""
        vars(self).update(state)
        self._register_hooks()

    def _register_hooks(self) -> None:
        for copy, master in self._masters.items():
            if copy.requires_grad:
                move = functools.partial(_move_gradient_to_master, master)
                copy.register_post_accumulate_grad_hook(move)

    def of(self, copy: nn.Parameter) -> nn.Parameter:
        """The master of one of the model's parameters; whole numbers and flags are their own, which bfloat16 would round."""
        return self._masters.get(copy, copy)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Inside it the masters have their values, which may be read and set, also by a step; afterwards the copies are these,
        rounded."""
        were_split = [*self.remainders]
        try:
            for master in were_split:
                self._join(master)
            yield
        finally:
            try:
                self._leave(were_split)
            except BaseException:  # Ctrl-C
                self._leave(were_split)
                raise

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """The same, with the masters as the model's parameters."""
        with self.whole():
            try:
                self._swap(copies=False)
                yield
            finally:
                self._swap(copies=True)

    @torch.no_grad()
    def _leave(self, were_split: list[nn.Parameter]) -> None:
        """As the end of `whole`; again from the start, if it was interrupted at any line."""
        for master in were_split:
            self._split(master)
        if whole := [master for master in self.copies if master not in self.remainders]:
            copies = [local_part(self.copies[master]) for master in whole]
            torch._foreach_copy_(copies, [local_part(master) for master in whole])

    @torch.no_grad()
    def _join(self, master: nn.Parameter) -> None:
        upper = local_part(self.copies[master]).view(torch.int16)
        _held(master).data = join(upper, self.remainders[master])
        del self.remainders[master]

    @torch.no_grad()
    def _split(self, master: nn.Parameter) -> None:
        local = _held(master)
        if master not in self.remainders:
            upper, lower = split(local)
            local_part(self.copies[master]).view(torch.int16).copy_(upper)
            self.remainders[master] = lower
        local.data = _nan_like(local)

    def _swap(self, copies: bool) -> None:
        for module, key, master, copy in self._places:
            module._parameters[key] = copy if copies else master


def _held(master: nn.Parameter) -> Tensor:
    """The tensor that has this rank's part of its values, not a view of it (private; read in torch 2.11 to 2.14)."""
    return master._local_tensor if isinstance(master, DTensor) else master


def _nan_like(tensor: Tensor) -> Tensor:
    """One NaN at all places, that no kernel may write to (private; read in torch 2.11 to 2.14)."""
    nan = tensor.new_full((), torch.nan)
    torch._C._set_throw_on_mutable_data_ptr(nan)
    return nan.expand(tensor.shape)


@torch.no_grad()
def _move_gradient_to_master(master: nn.Parameter, copy: Tensor) -> None:
    gradient, copy.grad = copy.grad, None
    if gradient is None:  # a matmul has added it to the master's
        return
    if master.grad is None:
        master.grad = gradient.to(torch.float32)
    else:
        local_part(master.grad).add_(local_part(gradient))


@dataclass
class TrainState:
    """The state of a run between two steps. The next rows follow from the step: there is no loader state to save."""

    step: int
    """Optimizer steps done."""
    model: nn.Module
    """The sharded model, with its weights."""
    optimizer: Optimizer
    masters: MasterWeights | None = None
    """Float32 master weights, if the model computes with bfloat16 copies: the optimizer updates these."""
    reducer: GradientReducer | None = None
    """Sums gradients over replicas, where nothing is sharded over data."""
    sums: GradientSums | None = None
    """Sums gradients over micro-batches, where matmuls do that."""

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Every parameter once, by its first name, as the optimizer updates it, with its gradient. (Values are in `weights`.)"""
        return trained_parameters(self.model, self.masters)

    @contextmanager
    def weights(self) -> Iterator[dict[str, Tensor]]:
        """Their values, under any plan: what a checkpoint saves, and loads into. The model's bfloat16 copies follow at the end.

        Split masters take their 4 bytes per parameter inside it: the room of the step's gradients, of which there are none.
        """
        with self.masters.whole() if self.masters else nullcontext():
            yield {name: parameter.detach() for name, parameter in self.trained_parameters().items()}

    @property
    def remainders(self) -> list[Tensor]:
        """What this rank has of split masters beside the model, in the optimizer's part of memory."""
        return [*self.masters.remainders.values()] if self.masters else []

    def set_weights(self, source: WeightSource) -> None:
        """Set every parameter from a weight source."""
        with self.masters.in_model() if self.masters else nullcontext():
            source(self.model)


def trained_parameters(model: nn.Module, masters: MasterWeights | None) -> dict[str, nn.Parameter]:
    """Every parameter once, by its first name: its master where it has one."""
    return {name: masters.of(p) if masters else p for name, p in model.named_parameters()}
