"""What a plan computes, step by step, as whole tensors: what two plans are compared by."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpresearch.config.schema import Config
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.data import AnyCorpus
from tpresearch.parallel.mesh import DATA_AXES, build_mesh, sum_over
from tpresearch.train.build import planned
from tpresearch.train.device import Device, choose_device
from tpresearch.train.loop import assemble, process_group

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class StepTrace:
    """One optimizer step: global values and whole tensors, in float64 on the CPU."""

    loss: float
    grad_norm: float
    """Before clipping."""
    gradients: Tensors
    """Before clipping, by parameter name."""
    weights: Tensors
    """After the update, by parameter name."""
    between_ranks: dict[str, float]
    """How far ranks are apart in what all should have alike: see `between_ranks`."""


@dataclass(frozen=True)
class Trace:
    initial: Tensors
    """The weights before the first step."""
    steps: list[StepTrace]
    held_out: float | None
    """The loss on held-out rows after the last step."""
    initial_between_ranks: dict[str, float]


def trace(cfg: Config, corpus: AnyCorpus, world: World, steps: int, device: Device | None = None) -> Trace:
    """Train for a few steps on this rank of a job, through the code that every run goes through.

    Args:
        device: the one that the config chooses, unless given.

    Returns: the trace as this rank sees it; `between_ranks` says whether all see the same.
    """
    sizes = validate(cfg, world.size, world.hosts)
    model, plan = planned(cfg, sizes)
    device = device or choose_device(cfg, world.local_rank, world.local_size)
    with process_group(device, world):
        mesh = build_mesh(sizes, device.type)
        trainer = assemble(cfg, model, plan, mesh, device, corpus)
        seen: list[Tensors] = []
        trainer.on_gradients = lambda model: seen.append(
            whole({n: p.grad for n, p in model.named_parameters()})
        )
        initial, taken = weights(model), []
        apart = between_ranks(initial, device.torch)
        for step in range(steps):
            share, norm = trainer.step(step, trainer.window(), None)
            loss = sum_over(mesh, share, DATA_AXES)
            gradients, updated = seen.pop(), weights(model)
            alike = {"loss": loss.cpu().double(), "grad norm": norm.cpu().double()}
            alike |= {f"gradient of {name}": gradient for name, gradient in gradients.items()} | updated
            taken.append(
                StepTrace(loss.item(), norm.item(), gradients, updated, between_ranks(alike, device.torch))
            )
        return Trace(initial, taken, trainer.evaluate(), apart)


def weights(model: nn.Module) -> Tensors:
    return whole(dict(model.named_parameters()))


def whole(tensors: dict[str, Tensor | None]) -> Tensors:
    """Every tensor gathered from all ranks that hold a part of it."""
    gathered = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            gathered[name] = full.detach().to("cpu", torch.float64, copy=True)
    return gathered


def between_ranks(tensors: Tensors, device: torch.device) -> dict[str, float]:
    """The greatest difference between any two ranks' copies of each tensor, relative to its greatest value."""
    if dist.get_world_size() == 1:
        return {}
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()]).to(device)
    least, most = flat.clone(), flat.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    sizes = [tensor.numel() for tensor in tensors.values()]
    apart = zip((most - least).split(sizes), most.abs().split(sizes), strict=True)
    scaled = (a.max().item() / (s.max().item() or 1.0) for a, s in apart)
    return dict(zip(tensors, scaled, strict=True))
