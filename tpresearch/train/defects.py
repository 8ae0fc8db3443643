"""The tutorial's mistakes, each made deliberately by an observer; `DefectsConfig` describes them."""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.config.schema import Config
from tpresearch.data.batches import Batch, Batches
from tpresearch.parallel.mesh import data_rank
from tpresearch.parallel.weights import from_seed
from tpresearch.plan.compiler import Plan
from tpresearch.train.adamw import ElementwiseAdamW
from tpresearch.train.observe import Observer
from tpresearch.train.state import TrainState

log = logging.getLogger(__name__)

RANK_SEED_STRIDE = 1_000_003
"""Distance between the seeds of two ranks; no rank has the seed of a correct run."""


def build_defects(cfg: Config, plan: Plan, mesh: DeviceMesh, batches: Batches) -> list[Observer]:
    """The observers that make the configured mistakes."""
    asked = [f.name for f in dataclasses.fields(cfg.defects) if getattr(cfg.defects, f.name)]
    if asked:
        log.warning("intentional defects enabled: %s", ", ".join(asked))
    known: dict[str, Observer] = {
        "keep_gradients": KeptGradients(),
        "weights_per_rank": WeightsPerRank(cfg.train.seed, plan, mesh),
        "overlapping_batches": OverlappingBatches(batches),
    }
    return [known[name] for name in asked]


class KeptGradients(Observer):
    """Gradients that are never zeroed: each step's are added to those of the last update.

    They are kept aside and added when a step's own are complete, so that they add up in the same way under every plan.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor | None] = []

    @torch.no_grad()
    def gradients(self, state: TrainState) -> None:
        trained = state.trained_parameters().values()
        # Of the last update, which torch's fused one scales gradients in place by, and ours only reads.
        divisor = state.optimizer.grad_scale if isinstance(state.optimizer, ElementwiseAdamW) else None
        for parameter, kept in zip(trained, self._kept, strict=False):
            if parameter.grad is not None and kept is not None:
                parameter.grad += kept if divisor is None else kept / divisor
        self._kept = [parameter.grad for parameter in trained]  # clipping scales these in place


class WeightsPerRank(Observer):
    """Initial weights from a generator of each data-parallel rank's own; the ranks along tp share it, since torch's
    `distribute_tensor` has the first of them send its weights to the others."""

    def __init__(self, seed: int, plan: Plan, mesh: DeviceMesh) -> None:
        self._source = from_seed(plan.initializers, seed + RANK_SEED_STRIDE * (1 + data_rank(mesh)))

    def start(self, state: TrainState) -> None:
        if state.step == 0:
            state.set_weights(self._source)


class OverlappingBatches(Observer):
    """Rows by step + rank: rank 1 reads at step k what rank 0 reads at step k + 1."""

    def __init__(self, batches: Batches) -> None:
        self._batches, self._right = batches, batches.batch

    def start(self, state: TrainState) -> None:
        setattr(self._batches, "batch", self._overlapping)  # noqa: B010  a method of one object, on purpose

    def _overlapping(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        return self._right(step + dp_rank, 0, dp_size)
