"""The state that a run's steps change: all that a checkpoint must hold."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tpresearch.parallel.gradient_sums import GradientSums
from tpresearch.parallel.reducer import GradientReducer
from tpresearch.parallel.weights import WeightSource, local_part


class MasterWeights:
    """Float32 master weights that the optimizer updates; the model computes with bfloat16 copies: mixed precision (arXiv
    1710.03740, section 3.1) where nothing is sharded by FSDP, which has its own.

    A gradient is added to its master's, in float32, as soon as backward has it, and dropped: per micro-batch that moves
    10 bytes per parameter, where `fully_shard` over one rank copies 42 to 54.

    Args:
        model: its parameters, in float32, become the masters; it is left with bfloat16 copies in their place.
    """

    def __init__(self, model: nn.Module) -> None:
        self._places: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []
        copies: dict[int, nn.Parameter] = {}
        for module in model.modules():
            for key, master in module._parameters.items():  # a tied one at each of its places
                if master is not None and master.is_floating_point():
                    if id(master) not in copies:
                        copies[id(master)] = _copy_of(master)
                    self._places.append((module, key, master, copies[id(master)]))
        self._masters = {id(copy): master for _, _, master, copy in self._places}
        self.copies: dict[nn.Parameter, Tensor] = {master: copy for _, _, master, copy in self._places}
        """By master weight."""
        self._swap(copies=True)

    def of(self, copy: nn.Parameter) -> nn.Parameter:
        """The master of one of the model's parameters; whole numbers and flags are their own, which bfloat16 would round."""
        return self._masters.get(id(copy), copy)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Inside it the masters are the model's parameters, so that they can be set; afterwards the copies are updated."""
        self._swap(copies=False)
        yield
        self._swap(copies=True)
        self.copy_to_model()

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Round every master to its copy, after each update."""
        copies = [local_part(copy) for _, _, _, copy in self._places]
        torch._foreach_copy_(copies, [local_part(master) for _, _, master, _ in self._places])

    def _swap(self, copies: bool) -> None:
        for module, key, master, copy in self._places:
            module._parameters[key] = copy if copies else master


def _copy_of(master: nn.Parameter) -> nn.Parameter:
    copy = nn.Parameter(master.detach().to(torch.bfloat16), master.requires_grad)
    if master.requires_grad:
        copy.register_post_accumulate_grad_hook(functools.partial(_move_gradient_to_master, master))
    return copy


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
        """Every parameter once, by its first name, as the optimizer updates it, with its gradient."""
        return trained_parameters(self.model, self.masters)

    def weights(self) -> dict[str, Tensor]:
        """Their values, under any plan: what a checkpoint saves, and loads into; call `refresh_copies` afterwards."""
        return {name: parameter.detach() for name, parameter in self.trained_parameters().items()}

    def refresh_copies(self) -> None:
        """Update the model's bfloat16 copies, after `weights` have changed."""
        if self.masters:
            self.masters.copy_to_model()

    def set_weights(self, source: WeightSource) -> None:
        """Set every parameter from a weight source."""
        with self.masters.in_model() if self.masters else nullcontext():
            source(self.model)


def trained_parameters(model: nn.Module, masters: MasterWeights | None) -> dict[str, nn.Parameter]:
    """Every parameter once, by its first name: its master where it has one."""
    return {name: masters.of(p) if masters else p for name, p in model.named_parameters()}
