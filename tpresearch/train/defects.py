"""The tutorial's mistakes, each behind a switch of `defects`: what goes wrong is said there."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.config.schema import Config, DefectsConfig
from tpresearch.parallel.mesh import data_rank

RANKS_APART = 1_000_003
"""Between the seeds of two ranks, so that no rank has the seed of an honest run."""


def defects_on(defects: DefectsConfig) -> list[str]:
    """The names of those that were asked for."""
    return [f.name for f in dataclasses.fields(defects) if getattr(defects, f.name)]


def weights_seed(cfg: Config, mesh: DeviceMesh) -> int:
    """What first weights are drawn by. With `weights_per_rank`, one for each data-parallel rank; the ranks along tp share
    it, since torch's `distribute_tensor` has the first of them send its weights to the others.
    """
    if not cfg.defects.weights_per_rank:
        return cfg.train.seed
    return cfg.train.seed + RANKS_APART * (1 + data_rank(mesh))


def part_to_read(cfg: Config, step: int, rank: int) -> tuple[int, int]:
    """(global batch, slice of it) that a data-parallel rank reads at a step."""
    return (step + rank, 0) if cfg.defects.overlapping_batches else (step, rank)


class KeptGradients:
    """Gradients that nobody zeroed: each step's are added to what was there when the last update was made.

    They are put aside and added by hand, when a step's own are whole, so that they add up alike under every plan.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: list[Tensor | None] = []

    @torch.no_grad()
    def add(self) -> None:
        for parameter, kept in zip(self._model.parameters(), self._kept, strict=False):
            if parameter.grad is not None and kept is not None:
                parameter.grad += kept

    def keep(self) -> None:
        self._kept = [parameter.grad for parameter in self._model.parameters()]
