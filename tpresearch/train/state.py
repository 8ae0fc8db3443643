"""The state that a run's steps change: all that a checkpoint must hold."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer

from tpresearch.parallel.replicas import Replicas
from tpresearch.parallel.weights import WeightSource
from tpresearch.train.masters import Masters


@dataclass
class TrainState:
    """The state of a run between two steps. The next rows follow from the step: there is no loader state to save."""

    step: int
    """Optimizer steps done."""
    model: nn.Module
    """The sharded model, with its weights."""
    optimizer: Optimizer
    masters: Masters | None = None
    """Float32 master weights, if the model computes with bfloat16 copies: the optimizer updates these."""
    replicas: Replicas | None = None
    """Sums gradients over replicas, where nothing is sharded over data."""

    def trained(self) -> dict[str, nn.Parameter]:
        """Every parameter once, by its first name, as the optimizer moves it, with its gradient."""
        return trained_parameters(self.model, self.masters)

    def weights(self) -> dict[str, Tensor]:
        """Their values, under any plan: what a checkpoint saves, and loads into; call `weights_set` afterwards."""
        return {name: parameter.detach() for name, parameter in self.trained().items()}

    def weights_set(self) -> None:
        """Have the model compute with what `weights` have become."""
        if self.masters:
            self.masters.hand_down()

    def set_weights(self, source: WeightSource) -> None:
        """Give every parameter another value."""
        with self.masters.in_model() if self.masters else nullcontext():
            source(self.model)


def trained_parameters(model: nn.Module, masters: Masters | None) -> dict[str, nn.Parameter]:
    """Every parameter once, by its first name: its master where it has one."""
    return {name: masters.of(p) if masters else p for name, p in model.named_parameters()}
