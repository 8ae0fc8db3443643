"""What the steps of a run change: all that a checkpoint has to hold."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer


@dataclass
class TrainState:
    """A run between two of its steps. Which rows come next follows from the step: there is no loader to save."""

    step: int
    """Optimizer steps done."""
    model: nn.Module
    """Sharded, with its weights."""
    optimizer: Optimizer
