"""What a plan computes, step by step, as whole tensors: what two plans are compared by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tpresearch.config.axes import DATA_AXES
from tpresearch.config.schema import Config
from tpresearch.config.world import World
from tpresearch.data.synthetic import AnyCorpus
from tpresearch.parallel.device import Device
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh, sum_over
from tpresearch.train.assemble import assemble
from tpresearch.train.observe import Observer
from tpresearch.train.preflight import preflight
from tpresearch.train.state import TrainState

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


class Gradients(Observer):
    """Keeps the last step's whole gradients, before clipping."""

    def __init__(self) -> None:
        self.last: Tensors = {}

    def gradients(self, state: TrainState) -> None:
        self.last = whole({name: p.grad for name, p in state.trained().items()})


def trace(cfg: Config, corpus: AnyCorpus, world: World, steps: int, device: Device | None = None) -> Trace:
    """Train for a few steps on this rank of a job, through the code that every run goes through.

    Args:
        device: the one that the config chooses, unless given.

    Returns: the trace as this rank sees it; `between_ranks` says whether all see the same.
    """
    job = preflight(cfg, world)
    device = device or job.device
    assert device
    with process_group(device, world):
        mesh, seen = build_mesh(job.sizes, device.type), Gradients()
        loop = assemble(job, mesh, device, corpus, [seen])
        initial, taken = whole(loop.state.weights()), []
        apart = between_ranks(initial, device.torch)
        for _ in range(steps):
            share, norm = loop.step()
            loss = sum_over(mesh, share, DATA_AXES)
            updated = whole(loop.state.weights())
            alike = {"loss": loss.cpu().double(), "grad norm": norm.cpu().double()}
            alike |= {f"gradient of {name}": gradient for name, gradient in seen.last.items()} | updated
            between = between_ranks(alike, device.torch)
            taken.append(StepTrace(loss.item(), norm.item(), seen.last, updated, between))
        return Trace(initial, taken, loop.evaluate(), apart)


def whole(tensors: Mapping[str, Tensor | None]) -> Tensors:
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
