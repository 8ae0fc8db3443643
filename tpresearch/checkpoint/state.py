"""A run's state as one flat dict of tensors by name: the same names whatever plan or mesh wrote it.

    model.<fqn>              every parameter once, and persistent buffers
    optimizer.<fqn>.<key>    exp_avg, exp_avg_sq, step, momentum_buffer of the parameter that they belong to

Param groups are not in it: their number differs from mesh to mesh, and what they hold is in the config.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tpresearch.checkpoint.disk import BrokenCheckpoint

MODEL, OPTIMIZER = "model.", "optimizer."


class CheckpointedState(Protocol):
    """A `TrainState`, as far as checkpoints are concerned."""

    step: int
    model: nn.Module
    optimizer: torch.optim.Optimizer

    def trained_parameters(self) -> dict[str, nn.Parameter]: ...
    def weights(self) -> AbstractContextManager[dict[str, Tensor]]: ...


@contextmanager
def state_of(trained: CheckpointedState) -> Iterator[dict[str, Tensor]]:
    """The state of a run: the tensors themselves, not copies. Optimizer state that does not exist yet, as of an unused weight, is absent."""
    moments = {
        f"{OPTIMIZER}{name}.{key}": value
        for name, parameter in trained.trained_parameters().items()
        for key, value in trained.optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    with trained.weights() as weights:
        yield model_state(trained.model, weights) | moments


def model_state(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The model's part of the state: these weights, and its persistent buffers."""
    buffers = dict(model.named_buffers())
    kept = {name: buffers[name] for name in model.state_dict() if name in buffers}
    return {f"{MODEL}{name}": tensor for name, tensor in {**weights, **kept}.items()}


def unsaved_module(model: nn.Module) -> str | None:
    """The first module with state that `model_state` leaves out, since it need not be a tensor: its `get_extra_state`."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            return name or "the model"
    return None


def make_destination(
    trained: CheckpointedState, weights: Mapping[str, Tensor], saved: Mapping[str, TensorStorageMetadata]
) -> dict[str, Tensor]:
    """The tensors to read a checkpoint into: one for each tensor that was saved.

    They follow what was saved, so that what was absent stays absent. A scalar of the optimizer's (`step`) is a plain
    tensor, on the parameter's device where torch's update is fused or capturable; all others are like their parameter.

    Raises:
        BrokenCheckpoint: for the state of a parameter that is not there.
    """
    trained.optimizer.state.clear()
    parameters = trained.trained_parameters()
    on_device = trained.optimizer.defaults.get("fused") or trained.optimizer.defaults.get("capturable")
    destination = model_state(trained.model, weights)
    for full in saved:
        if not full.startswith(OPTIMIZER):
            continue
        name, _, key = full.removeprefix(OPTIMIZER).rpartition(".")
        if name not in parameters:
            raise BrokenCheckpoint(f"it has optimizer state of {name}, which this model lacks")
        parameter = parameters[name]
        if saved[full].size == parameter.shape and key != "step":
            made = torch.zeros_like(parameter.detach(), dtype=saved[full].properties.dtype)
        else:
            device = parameter.device if on_device else "cpu"
            made = torch.zeros(saved[full].size, dtype=saved[full].properties.dtype, device=device)
        trained.optimizer.state[parameter][key] = made
        destination[full] = made
    return destination
