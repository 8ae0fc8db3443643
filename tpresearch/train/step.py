"""One optimizer step: gradients of the global batch, their norm, clipping, update. The same for every plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tpresearch.data import Batch
from tpresearch.parallel.mesh import global_norm, sum_together
from tpresearch.plan.compiler import Plan
from tpresearch.train.loss import Objective

Phase = Callable[[str], AbstractContextManager[None]]
"""Marks a part of the step (forward, loss, backward, clip, optimizer) for whoever counts what it sends."""


def unmarked(phase: str) -> AbstractContextManager[None]:
    return nullcontext()


def accumulate_gradients(
    model: nn.Module,
    micro_batches: Sequence[Batch],
    objective: Objective,
    mark: Phase = unmarked,
) -> Tensor:
    """Add the gradient of the loss to every parameter.

    Args:
        micro_batches: this data-parallel rank's rows, at least one.

    Returns: this data-parallel rank's share of the loss, a detached scalar; the shares sum to the global loss.
    """
    dtype = torch.float64 if _is_float64(model) else torch.float32
    share = torch.zeros((), dtype=dtype, device=micro_batches[0].inputs.device)
    for index, batch in enumerate(micro_batches):
        if isinstance(model, FSDPModule):  # replicas are summed once, after the last micro-batch
            model.set_requires_all_reduce(index == len(micro_batches) - 1)
        with objective.context():
            with mark("forward"):
                output = model(objective.inputs(batch))
            with mark("loss"):
                loss = objective.part(output, batch.targets)
            del output
            with mark("backward"):
                loss.backward()
        share += loss.detach()
    return share


def _is_float64(model: nn.Module) -> bool:
    return next(model.parameters()).dtype == torch.float64


@torch.no_grad()
def reduce_partial_gradients(model: nn.Module, plan: Plan, mesh: DeviceMesh) -> None:
    """Sum over tp, once, the gradients that are still parts of a sum: those of norms under sequence parallelism.

    A rule with a ParallelStyle of the user's own may leave partial DTensors, which an optimizer would sum anew
    at each use: those too.
    """
    gradients = [p.grad for p in plan.partial(model).values() if p.grad is not None]
    sum_together(mesh, [g.to_local() if isinstance(g, DTensor) else g for g in gradients], "tp")
    for parameter in model.parameters():
        gradient = parameter.grad
        if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
            continue
        if gradient.placements != parameter.placements:
            parameter.grad = gradient.redistribute(placements=parameter.placements)


@torch.no_grad()  # or each `to_local` is recorded for a backward through it
def clip_gradients(model: nn.Module, mesh: DeviceMesh, greatest: float | None) -> Tensor:
    """Scale all gradients by min(1, greatest / norm), without waiting for the device; None scales nothing.

    Returns: the global norm before clipping, the same scalar on every rank.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = global_norm(gradients, mesh)
    if greatest is not None:
        scale = (greatest / (norm + 1e-6)).clamp(max=1.0)
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        for same_dtype in {g.dtype for g in local}:
            chosen = [g for g in local if g.dtype == same_dtype]
            torch._foreach_mul_(chosen, scale.to(chosen[0].device, same_dtype))
    return norm
