"""A check of the first step: what the plan holds to be replicated has one gradient on all ranks that share it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.config.axes import LAYER_AXES
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.config.validate import total_steps
from tpresearch.parallel.mesh import axis_size
from tpresearch.parallel.weights import local_part
from tpresearch.plan.compiler import Plan
from tpresearch.train.observe import Observer
from tpresearch.train.state import TrainState

SAMPLES = 1024
"""Elements of each gradient that are compared."""

TOLERANCE = 0.05
"""Relative to the greatest element: what kernels that add in any order stay far below, and a partial gradient does not."""


class AgreedGradients(Observer):
    """Refuses, in the first step of this process, a parameter without a rule that acts on a shard: each rank along the axes that
    shard layers has the gradient of its own shard, and its weights would drift apart. (A second step follows, or it is
    the one that the ledger counts, and nothing is compared.)
    """

    def __init__(self, cfg: Config, plan: Plan, mesh: DeviceMesh) -> None:
        self._cfg, self._plan, self._mesh = cfg, plan, mesh
        self._at = -1

    def start(self, state: TrainState) -> None:
        if self._plan.rules and state.step + 1 < total_steps(self._cfg):
            self._at = state.step

    @torch.no_grad()
    def gradients(self, state: TrainState) -> None:
        """Compare the gradients of replicated parameters between the ranks that share them, in one step.

        Raises:
            ConfigError: naming the first that differs, on every rank.
        """
        if state.step != self._at:
            return
        trained = state.trained_parameters()
        having = {n: g for n in self._plan.replicated if n in trained and (g := trained[n].grad) is not None}
        if not having:
            return
        parts = [_sample(gradient) for gradient in having.values()]
        flat = torch.cat(parts).to(self._mesh.device_type)
        least, most = flat.clone(), flat
        for axis in LAYER_AXES:
            if axis_size(self._mesh, axis) > 1:
                dist.all_reduce(least, dist.ReduceOp.MIN, self._mesh.get_group(axis))
                dist.all_reduce(most, dist.ReduceOp.MAX, self._mesh.get_group(axis))
        sizes = [len(part) for part in parts]
        pairs = zip((most - least).split(sizes), torch.maximum(most, -least).split(sizes), strict=True)
        apart = torch.stack(
            [(d.sum() * 0 if not len(d) else (d.max() > TOLERANCE * s.max()).to(d.dtype)) for d, s in pairs]
        )
        dist.all_reduce(apart, dist.ReduceOp.MAX)  # all ranks end, or none
        for name, differs in zip(having, apart.tolist(), strict=True):
            if differs:
                raise self._refusal(name)

    def _refusal(self, name: str) -> ConfigError:
        plan = self._cfg.parallel.tensor
        why = (
            f"the gradient of {name} differs between tensor-parallel ranks that each hold all of it: its module "
            "works on a shard, and its gradient is partial"
        )
        legal = (
            "a rule for its module by which partial gradients are summed: style sequence, with the dim that is "
            "sharded there as src and dst, such as shard:2"
        )
        return ConfigError(f"model.plans.{plan}", plan, why, legal, fix={})


def _sample(gradient: Tensor) -> Tensor:
    """Up to `SAMPLES` elements, evenly spaced, of what this rank holds, in at least float32."""
    flat = local_part(gradient).flatten()
    flat = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
    return flat.to(torch.promote_types(flat.dtype, torch.float32))
