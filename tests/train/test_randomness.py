"""Dropout draws by its place in the run: the same run to the bit, replicas alike, shards apart, recomputed alike."""

from __future__ import annotations

import pytest
import torch
from support.composed import config, corpus
from support.nets import Dropped, model
from torch import Tensor

from tpresearch.config import Config
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.plan.describe import plan_text
from tpresearch.train.assemble import assemble
from tpresearch.train.preflight import planned, preflight
from tpresearch.verify.ranks import Ranks


def dropped(world: World, cfg: Config) -> tuple[list[float], list[Tensor]]:
    """Loss and norm of two steps, and which features were dropped in each forward pass."""
    job, masks = preflight(cfg, world), []
    assert job.device
    with process_group(job.device, world):
        loop = assemble(job, build_mesh(job.sizes, "cpu"), job.device, corpus())
        loop.state.model.drop.register_forward_hook(lambda _, args, out: masks.append(out.detach() == 0))
        numbers = [number.item() for _ in range(2) for number in loop.step()]
    return numbers, masks


def test_the_same_seed_is_the_same_run_to_the_bit_and_another_is_another() -> None:
    cfg = config(*model(Dropped), "parallel=none", "train.micro_batch_size=4")
    (first, masks), (again, _) = dropped(World(), cfg), dropped(World(), cfg)
    assert first == again
    assert len(masks) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert all(0.45 < mask.float().mean() < 0.55 for mask in masks)
    assert dropped(World(), config(*model(Dropped), "parallel=none", "train.seed=1"))[0] != first


@pytest.mark.parametrize(("plan", "alike"), [("tp", True), ("sp", False), ("fsdp", False)])
def test_replicas_agree_and_shards_draw_their_own(ranks: Ranks, plan: str, alike: bool) -> None:
    (_, mine), (_, theirs) = ranks.run(2, dropped, config(*model(Dropped), f"parallel={plan}"))
    assert [torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)] == [alike] * len(mine)


def test_what_is_recomputed_drops_the_same(ranks: Ranks) -> None:
    """Under sp each rank draws by its own place; recomputing in backward must come to the same."""
    settings = (*model(Dropped), "parallel=sp", "model.blocks=[drop,mlp]", "train.dtype=float64")
    plain = ranks.run(2, dropped, config(*settings))
    again = ranks.run(2, dropped, config(*settings, "parallel.activation_checkpointing=full"))
    assert [numbers for numbers, _ in plain] == [pytest.approx(numbers, rel=1e-12) for numbers, _ in again]


def test_the_plan_says_that_equality_is_not_claimed() -> None:
    cfg = config(*model(Dropped), "parallel=none")
    text = plan_text(*planned(cfg, validate(cfg, 1)))
    assert "random numbers: drop draw by (seed, step, micro-batch, data-parallel rank)" in text
    assert "not claimed" in text
    honest = config("model=llama2_debug", "parallel=none")
    assert "random" not in plan_text(*planned(honest, validate(honest, 1)))
