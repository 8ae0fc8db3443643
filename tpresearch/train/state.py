"""What the steps of a run change: all that a checkpoint has to hold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass
class TrainState:
    """A run between two of its steps. Which rows come next follows from the step: there is no loader to save."""

    step: int
    """Optimizer steps done."""
    model: nn.Module
    """Sharded, with its weights."""
    optimizer: Optimizer

    def weights(self) -> dict[str, Tensor]:
        """Every parameter once, by its first name, in float32 or wider: what a checkpoint keeps, and loads into."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}
