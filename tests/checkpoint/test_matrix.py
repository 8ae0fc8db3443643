"""Every plan goes on from what every plan saved: restored to the bit, and two steps later where no run was stopped.

Every day each plan saves once and loads once, in a chain that goes on from link to link, and the larger model goes
through a short one; the whole matrix, 64 pairs for each model and optimizer, is exhaustive.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path

import pytest
from support.checkpointed import Went, apart, equal, go, on_disk
from support.composed import config
from support.marks import exhaustive

from tpresearch.checkpoint.disk import folder_of
from tpresearch.config import Config
from tpresearch.config.world import World
from tpresearch.verify.ranks import Ranks

STEPS = 2
"""Before a checkpoint, and after it: the second is from moments that went on."""
CELLS = {
    "none": (1, []),
    "ddp": (2, []),
    "tp": (2, []),
    "sp": (2, []),
    "fsdp": (2, []),
    "hsdp": (4, ["mesh.dp_shard=2"]),
    "fsdp_tp": (4, ["mesh.tp=2"]),
    "hsdp_tp": (4, ["mesh.tp=2", "mesh.dp_shard=1"]),
}
"""Of each plan, on how many ranks, and how they lie."""
MODELS = {
    "toy_mlp": ["model=toy_mlp", "model.hidden_dim=250", "tokenizer.vocab_size=260", "model.vocab_size=263"],
    "llama2_debug": ["model=llama2_debug"],
}
"""The first has shards of unequal size."""
OPTIMIZERS = {"adamw": ["optimizer=adamw"], "sgd": ["optimizer=sgd", "optimizer.momentum=0.9"]}
COMMON = ["train.dtype=float64", "train.clip_grad_norm=0.2", "schedule.warmup_steps=2", "train.steps=32"]


def cell(plan: str, model: str, optimizer: str) -> tuple[int, Config]:
    size, mesh = CELLS[plan]
    return size, config(f"parallel={plan}", *mesh, *MODELS[model], *OPTIMIZERS[optimizer], *COMMON)


@cache
def uninterrupted(model: str, optimizer: str, steps: int) -> Went:
    """One process, from the first step to the last."""
    went = go(World(), cell("none", model, optimizer)[1], steps)
    assert went
    return went


def check(went: Went, saved: Path, whole_run: Went, from_step: int) -> None:
    """That a job was restored to the bit, and went on as the run that nobody stopped."""
    assert equal(went.restored, on_disk(saved))
    for ours, theirs in ((went.losses, whole_run.losses), (went.norms, whole_run.norms)):
        assert ours == pytest.approx(theirs[from_step : from_step + STEPS], rel=1e-10, abs=0)


ALL = ["fsdp_tp", "none", "hsdp", "tp", "fsdp", "hsdp_tp", "sp", "ddp", "fsdp_tp"]
CHAINS = [
    ("toy_mlp", "sgd", ALL),
    ("llama2_debug", "adamw", ["fsdp", "none", "fsdp_tp", "fsdp"]),
    exhaustive("llama2_debug", "adamw", ALL),
]


@pytest.mark.parametrize(("model", "optimizer", "plans"), CHAINS)
def test_each_plan_resumes_from_another(
    ranks: Ranks, tmp_path: Path, model: str, optimizer: str, plans: list[str]
) -> None:
    whole_run = uninterrupted(model, optimizer, len(plans) * STEPS)
    start, went = None, Went()
    for nth, plan in enumerate(plans):
        size, cfg = cell(plan, model, optimizer)
        done = nth * STEPS
        went = ranks.run(size, go, cfg, STEPS, start, tmp_path, (done + STEPS,))[0]
        if start:
            check(went, start, whole_run, done)
        start = folder_of(tmp_path, done + STEPS)
    assert apart(went.state, whole_run.state) < 1e-10


def test_the_same_plan_resumes_bitwise(ranks: Ranks, tmp_path: Path) -> None:
    size, cfg = cell("fsdp", "llama2_debug", "adamw")
    never_stopped = ranks.run(size, go, cfg, 2 * STEPS, None, tmp_path, (STEPS,))[0]
    went = ranks.run(size, go, cfg, STEPS, folder_of(tmp_path, STEPS))[0]
    assert equal(went.state, never_stopped.state)
    assert (went.losses, went.norms) == (never_stopped.losses[STEPS:], never_stopped.norms[STEPS:])


@pytest.mark.exhaustive
@pytest.mark.parametrize(("saves", "model", "optimizer"), [*itertools.product(CELLS, MODELS, OPTIMIZERS)])
def test_the_whole_matrix(ranks: Ranks, tmp_path: Path, saves: str, model: str, optimizer: str) -> None:
    size, cfg = cell(saves, model, optimizer)
    never_stopped = ranks.run(size, go, cfg, 2 * STEPS, None, tmp_path, (STEPS,))[0]
    saved, whole_run = folder_of(tmp_path, STEPS), uninterrupted(model, optimizer, 2 * STEPS)
    for loads in CELLS:
        size, cfg = cell(loads, model, optimizer)
        went = ranks.run(size, go, cfg, STEPS, saved)[0]
        check(went, saved, whole_run, STEPS)
        assert apart(went.state, whole_run.state) < 1e-10, loads
        if loads == saves:
            assert equal(went.state, never_stopped.state)
