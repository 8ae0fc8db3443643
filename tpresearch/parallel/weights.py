"""Initial weights that depend on the seed and the parameter's name, never on the mesh."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from tpresearch.config.schema import ParallelConfig


def materialize(
    model: nn.Module, device: torch.device, seed: int, buffers: torch.device | None = None
) -> None:
    """Move a model off the meta device and draw every weight: each rank fills its own shards, nothing is sent.

    Args:
        device: where parameters go. seed: with each parameter's name, decides its values.
        buffers: where buffers go, if elsewhere: parameters may be offloaded, buffers are not.

    Raises:
        ValueError: for a module with parameters and no `reset_parameters`.
    """
    model.to_empty(device=device)
    if buffers is not None and buffers != device:
        for module in model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                module.register_buffer(
                    key, buffer.to(buffers), persistent=key not in module._non_persistent_buffers_set
                )
    for parameter, full in draw_all(model, seed):
        fill(parameter, full)
    reset_buffers(model)


def place_weights(model: nn.Module, device: torch.device, seed: int, buffers: torch.device) -> None:
    materialize(model, device, seed, buffers)


def first_weights(model: nn.Module, seed: int) -> None:
    draw_weights(model, seed)


def draw_weights(model: nn.Module, seed: int) -> None:
    for parameter, full in draw_all(model, seed):
        fill(parameter, full)


def parameter_device(parallel: ParallelConfig, device: torch.device) -> torch.device:
    """Where a rank keeps its parameters: its device, or the host's memory where they are offloaded."""
    return torch.device("cpu") if parallel.fsdp.cpu_offload else device


@torch.no_grad()
def fill(parameter: Tensor, full: Tensor) -> None:
    """Give a parameter its values; a sharded one takes its part, and nothing is sent."""
    if isinstance(parameter, DTensor):
        moved = full.to(parameter.to_local().device, parameter.dtype)
        shard = distribute_tensor(moved, parameter.device_mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(shard.to_local())
    else:
        parameter.copy_(full)


def draw_all(model: nn.Module, seed: int) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(parameter, its whole initial value on the CPU) for every parameter, one at a time."""
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{prefix}.{key}" if prefix else key
            yield parameter, draw(module, key, name, seed)


def draw(module: nn.Module, key: str, name: str, seed: int) -> Tensor:
    """The whole initial value of one parameter, float32, from a generator seeded by (seed, name).

    A stand-in for the module, with whole parameters on the CPU, is given to the module's own
    `reset_parameters`, so a model says how it starts in the way that torch's layers do.
    """
    if not hasattr(module, "reset_parameters"):
        raise ValueError(
            f"{name}: {type(module).__name__} has parameters and no reset_parameters; write one that draws them"
        )
    stand_in: nn.Module = object.__new__(
        type(module)
    )  # FSDP gives its classes a __new__ that copying would call
    stand_in.__dict__ = dict(module.__dict__)
    stand_in._parameters = {
        other: None
        if p is None
        else nn.Parameter(torch.empty(p.shape, dtype=torch.float32), requires_grad=False)
        for other, p in module._parameters.items()
    }
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int.from_bytes(digest[:8], "little"))
        stand_in.reset_parameters()  # type: ignore[operator]
    drawn = stand_in._parameters[key]
    assert drawn is not None
    return drawn.data


def reset_buffers(model: nn.Module) -> None:
    """Fill every buffer again: `to_empty` left them unset."""
    for name, module in model.named_modules():
        if hasattr(module, "reset_buffers"):
            module.reset_buffers()
        elif any(True for _ in module.buffers(recurse=False)):
            raise ValueError(
                f"{name or type(module).__name__}: has buffers and no reset_buffers; write one that fills them"
            )
