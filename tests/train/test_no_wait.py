"""No step makes the host wait for the device: whole steps on fake tensors, of which nothing can be read."""

from __future__ import annotations

import pytest
import torch
from support.composed import config, in_two_parts
from support.counted_steps import FAKE, PLANS
from support.marks import exhaustive
from support.nets import Unused, model
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from tpresearch.config import Config
from tpresearch.config.world import World
from tpresearch.data.batches import Batch
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.parallel.weights import materialize
from tpresearch.train.assemble import build_state
from tpresearch.train.finite import FiniteCheck
from tpresearch.train.losses import build_objective
from tpresearch.train.observe import Observers
from tpresearch.train.preflight import preflight
from tpresearch.train.step import Setup, train_step

EVERY_DAY = {"none", "sp", "hsdp_tp"}


def two_steps(cfg: Config, world: int) -> None:
    """On rank 0, forward to update: an `.item()`, a `.tolist()` or a branch on a value raises."""
    here = World(size=world, local_size=world)
    job = preflight(cfg, here)
    rows = cfg.train.global_batch_size // job.sizes.dp
    with process_group(FAKE, here):
        mesh = build_mesh(job.sizes, "cpu")
        model = parallelize(job.model, job.plan, cfg.parallel, mesh, cfg.train.dtype)
        with FakeTensorMode(allow_non_fake_inputs=True):
            materialize(model, FAKE.torch, lambda _: None)
            state = build_state(model, cfg, job.plan, mesh)
            setup = Setup(cfg, job.plan, mesh, FAKE, build_objective(cfg, job.plan), Observers())
            finite = FiniteCheck(FAKE.torch)
            for _ in range(2):
                batch = Batch.of(torch.empty((rows, cfg.data.seq_len + 1), dtype=torch.int64))
                result = train_step(state, batch, setup)
                finite.record(state.step, result)


@pytest.mark.parametrize(("plan", "world"), [p if p[0] in EVERY_DAY else exhaustive(*p) for p in PLANS])
def test_a_step_of_a_plan_waits_for_nothing(plan: str, world: int) -> None:
    """In bfloat16, in two micro-batches of three chunks, clipped, and with updates that may be skipped."""
    cfg = config(
        *("model=llama2_debug", f"parallel={plan}", "train.dtype=bfloat16", "train.loss_chunk=6"),
        *("train.on_nonfinite=skip", "train.clip_grad_norm=0.2"),
    )
    two_steps(in_two_parts(cfg, world), world)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.activation_checkpointing=selective"],
        ["parallel.activation_checkpointing=full", "train.weights=bfloat16", "train.dtype=bfloat16"],
        ["optimizer=sgd", "train.loss_chunk=null"],
        ["optimizer.moment_dtype=bfloat16", "train.on_nonfinite=skip"],
    ],
    ids=" ".join,
)
def test_nor_does_an_option(overrides: list[str]) -> None:
    two_steps(config("model=llama2_debug", "parallel=fsdp_tp", *overrides), 4)


@pytest.mark.parametrize("overrides", [["optimizer.split_masters=true"], []], ids=" ".join)
def test_nor_do_gradients_that_matmuls_add_up(overrides: list[str]) -> None:
    fused = ("parallel=none", "train.dtype=bfloat16", "parallel.gradient_accumulation_fusion=true")
    two_steps(config("model=llama2_debug", "train.micro_batch_size=2", *fused, *overrides), 1)


def test_nor_does_a_weight_that_no_replica_has_a_gradient_of() -> None:
    two_steps(config(*model(Unused), "parallel=ddp"), 2)


def test_a_wait_would_be_seen() -> None:
    """SGD has no update that can leave itself out: skipping waits for the norm."""
    with pytest.raises(DataDependentOutputException):
        two_steps(
            config("model=llama2_debug", "parallel=none", "optimizer=sgd", "train.on_nonfinite=skip"), 1
        )
