"""One optimizer step: gradients of the global batch, their norm, clipping, update. The same for every plan."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from tpresearch.config.choices import OnNonfinite
from tpresearch.config.schema import Config
from tpresearch.config.validate import micro_batch_size, tokens_per_step, total_steps
from tpresearch.data.batches import Batch
from tpresearch.parallel.apply import check_summed
from tpresearch.parallel.device import Device
from tpresearch.parallel.mesh import sum_coalesced
from tpresearch.parallel.norm import global_norm
from tpresearch.parallel.reducer import match_placements
from tpresearch.parallel.weights import local_part
from tpresearch.plan.compiler import Plan
from tpresearch.train.adamw import AdamW, ElementwiseAdamW
from tpresearch.train.cross_entropy import backward_from
from tpresearch.train.losses import Objective
from tpresearch.train.observe import Observers
from tpresearch.train.optim import divide_gradients, learning_rate, refusing_shards, set_learning_rate
from tpresearch.train.state import TrainState


@dataclass(frozen=True)
class Setup:
    """The fixed context of every step of a run."""

    cfg: Config
    plan: Plan
    mesh: DeviceMesh
    device: Device
    objective: Objective
    observers: Observers

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        return total_steps(self.cfg)

    @property
    def micro_rows(self) -> int:
        """Rows per data-parallel rank and forward pass."""
        return micro_batch_size(self.cfg, self.plan.sizes)

    @property
    def input_dtype(self) -> torch.dtype:
        """Dtype of float inputs to the model: that of the computation."""
        return getattr(torch, self.cfg.train.dtype)

    @property
    def tokens_per_step(self) -> int:
        return tokens_per_step(self.cfg)


class StepResult(NamedTuple):
    """The result of a step, on the device: reading it makes the host wait."""

    loss: Tensor
    """This data-parallel rank's share of the global loss, a scalar; the shares sum to it."""
    grad_norm: Tensor
    """The global norm before clipping, the same on every rank."""


def train_step(state: TrainState, batch: Batch, setup: Setup) -> StepResult:
    """One optimizer step: update the weights once, by the gradient of the global batch.

    Args:
        batch: this data-parallel rank's rows of the global batch.
    """
    observers = setup.observers
    with _no_gradients_left(state), observers.step(state):
        with state.sums.collecting() if state.sums else nullcontext():
            loss = accumulate_gradients(state, batch.split(setup.micro_rows), setup)
        with observers.phase("backward"):
            reduce_partial_gradients(state, setup.plan, setup.mesh)
        observers.gradients(state)
        with observers.phase("clip"):
            norm = clip_gradients(state, setup.mesh, setup.cfg.train.clip_grad_norm)
        with observers.phase("optimizer"):
            update(state, norm, setup)
    state.step += 1
    return StepResult(loss, norm)


@contextmanager
def _no_gradients_left(state: TrainState) -> Iterator[None]:
    """Drops the gradients, and the sums over replicas, of a step that is not finished, such as one that is interrupted in a
    notebook: the next would add to them."""
    try:
        yield
    except BaseException:
        state.optimizer.zero_grad()
        state.model.zero_grad()  # of a bfloat16 copy, which its master would get
        if state.reducer:
            state.reducer.forget()
        raise


def accumulate_gradients(state: TrainState, micro_batches: list[Batch], setup: Setup) -> Tensor:
    """Add the gradient of the loss to every parameter, summed over data-parallel ranks; over replicas once.

    Returns: this data-parallel rank's share of the loss, a detached scalar.
    """
    model, objective, phase = state.model, setup.objective, setup.observers.phase
    parameter = next(model.parameters())
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    share = torch.zeros((), dtype=dtype, device=micro_batches[0].inputs.device)
    for index, rows in enumerate(micro_batches):
        last = index == len(micro_batches) - 1
        if isinstance(model, FSDPModule):
            model.set_requires_all_reduce(last)
        elif state.reducer:
            state.reducer.is_last_backward = last
        with objective.context():
            loss = objective(model, rows, phase)
            with phase("backward"):
                backward_from(loss)
        share += loss.detach()
    if state.reducer:
        with phase("backward"):
            state.reducer.finish()
    check_summed(model)
    return share


@torch.no_grad()
def reduce_partial_gradients(state: TrainState, plan: Plan, mesh: DeviceMesh) -> None:
    """Sum partial gradients, once per step: those of norms under sequence parallelism.

    Includes partial DTensors from a rule with a custom ParallelStyle, which an optimizer would otherwise sum at
    each use.
    """
    by_axis: dict[str, list[Tensor]] = {}
    trained = state.trained_parameters()
    for name in plan.partial_grads(state.model):
        if (gradient := trained[name].grad) is not None:
            by_axis.setdefault(plan.rules[name.rpartition(".")[0]].axis, []).append(local_part(gradient))
    for axis, gradients in by_axis.items():
        sum_coalesced(mesh, gradients, axis)
    for parameter in trained.values():
        if parameter.grad is not None:
            parameter.grad = match_placements(parameter.grad, parameter)


@torch.no_grad()  # or each `to_local` is recorded for a backward through it
def clip_gradients(state: TrainState, mesh: DeviceMesh, max_norm: float | None) -> Tensor:
    """Scale all gradients by min(1, greatest / norm), without waiting for the device; None scales nothing.

    Returns: the global norm before clipping, the same scalar on every rank.
    """
    gradients = [p.grad for p in state.trained_parameters().values() if p.grad is not None]
    norm = global_norm(gradients, mesh)
    if max_norm is not None:
        divisor = ((norm + 1e-6) / max_norm).clamp(min=1.0)
        divide_gradients(state.optimizer, [local_part(gradient) for gradient in gradients], divisor)
    return norm


def update(state: TrainState, norm: Tensor, setup: Setup) -> None:
    """Update the weights, unless the norm is not finite and such updates are skipped.

    AdamW skips by itself; for another optimizer the host waits for the norm.
    """
    cfg, optimizer = setup.cfg, state.optimizer
    skips = cfg.train.on_nonfinite is OnNonfinite.skip
    if skips and isinstance(optimizer, AdamW):
        home = optimizer.param_groups[0]["params"][0].device  # as in `divide_gradients`
        optimizer.found_inf = (~norm.isfinite()).float().to(home)
    if not skips or isinstance(optimizer, AdamW) or math.isfinite(norm.item()):
        set_learning_rate(optimizer, learning_rate(state.step, setup.steps, cfg.optimizer.lr, cfg.schedule))
        # Our own updates the model's copies itself.
        masters = None if isinstance(optimizer, ElementwiseAdamW) else state.masters
        with masters.whole() if masters else nullcontext(), refusing_shards(optimizer, cfg.parallel.name):
            optimizer.step()
    optimizer.zero_grad()
