"""GPT, which the published rows need, under every plan: it computes what one process does, by three files of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.composed import config, corpus
from support.marks import exhaustive
from support.traces import CLIP, PLANS, agree

from tpresearch.config import Config
from tpresearch.config.world import World
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.trace import RunTrace, trace_run

CONF = Path(__file__).parents[2] / "experiments" / "published" / "conf"


def gpt(*overrides: str) -> Config:
    sizes = ("model.dim=32", "model.n_heads=4", "model.n_layers=2", "model.ffn_dim=64")
    steps = (
        "train.dtype=float64",
        f"train.clip_grad_norm={CLIP}",
        "optimizer=sgd",
        "schedule.warmup_steps=1",
    )
    return config(f"hydra.searchpath=[file://{CONF}]", "model=gpt", *sizes, *steps, *overrides)


def job(world: World, cfg: Config) -> RunTrace | None:
    result = trace_run(cfg, corpus(), world, 2)
    return result if world.rank == 0 else None


ROTARY = ("model.positions=rope", "model.n_kv_heads=2", "model.tied=false", "~model.plans.sp.places")
EVERY_DAY = ("tp", "fsdp_tp")


@pytest.mark.parametrize("plan", [plan if plan in EVERY_DAY else exhaustive(plan) for plan in PLANS])
@pytest.mark.parametrize("shape", [(), exhaustive(ROTARY)], ids=["learned positions", "rotary, shared heads"])
def test_each_plan_computes_what_one_process_does(ranks: Ranks, plan: str, shape: tuple[str, ...]) -> None:
    alone = trace_run(gpt("parallel=none", *shape), corpus(), World(), 2)
    size = 2 if plan in ("tp", "sp") else 4
    agree(ranks.run(size, job, gpt(f"parallel={plan}", *shape))[0], alone)
