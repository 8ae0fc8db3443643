"""Whole steps of rank 0 on fake tensors, of which nothing can be read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from support.counted_steps import FAKE
from tpresearch.config import Config
from tpresearch.config.world import World
from tpresearch.data.batches import Batch
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.device import Device
from tpresearch.parallel.float8 import to_float8
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.parallel.weights import materialize
from tpresearch.train.assemble import build_state
from tpresearch.train.finite import FiniteCheck
from tpresearch.train.losses import build_objective
from tpresearch.train.observe import Observers
from tpresearch.train.preflight import preflight
from tpresearch.train.step import Setup, train_step


def two_steps(
    cfg: Config, world: int, device: Device = FAKE, watched: AbstractContextManager[object] | None = None
) -> None:
    """Forward to update: an `.item()`, a `.tolist()` or a branch on a value raises.

    Args:
        watched: entered around each step.
    """
    here = World(size=world, local_size=world)
    job = preflight(cfg, here)
    rows = cfg.train.global_batch_size // job.sizes.dp
    with process_group(device, here):
        mesh = build_mesh(job.sizes, device.type)
        to_float8(job.model, job.plan.float8, cfg.train)
        model = parallelize(job.model, job.plan, cfg.parallel, mesh, cfg.train.dtype)
        with FakeTensorMode(allow_non_fake_inputs=True):
            materialize(model, device.torch, lambda _: None)
            state = build_state(model, cfg, job.plan, mesh)
            setup = Setup(cfg, job.plan, mesh, device, build_objective(cfg, job.plan), Observers())
            finite = FiniteCheck(device.torch)
            batch = Batch.of(torch.empty((rows, cfg.data.seq_len + 1), dtype=torch.int64)).to(device.torch)
            for _ in range(2):
                with watched or nullcontext():
                    result = train_step(state, batch, setup)
                    finite.record(state.step, result)
