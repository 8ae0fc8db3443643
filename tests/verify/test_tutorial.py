"""The tutorial's three scripts: each plan equals one process in float64, and each mistake shows in a named quantity."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from support.composed import config
from support.counted_steps import FAKE, count
from support.marks import exhaustive
from support.traces import digested, traced

from tpresearch.config import Config
from tpresearch.config.schema import Dtype
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.data.batches import Batches
from tpresearch.data.pipeline import prepare
from tpresearch.ledger.entries import Entry
from tpresearch.ledger.formulas import expected_entries
from tpresearch.plan.meta import meta_model
from tpresearch.train.defects import OverlappingBatches
from tpresearch.train.preflight import plan_model
from tpresearch.train.state import TrainState
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.reference import reference
from tpresearch.verify.trace import RunTrace, compare, out_of_tolerance, trace_run

STEPS = 2
NARROW = ("model.dim=32", "model.n_heads=4", "model.n_kv_heads=4", "model.ffn_dim=64", "data.seq_len=16")
NARROW += ("tokenizer.vocab_size=263",)  # which 2 and 4 do not divide


def experiment(name: str, *overrides: str, whole: bool = False) -> Config:
    """An experiment in float64; the 2D one is narrow unless it is asked for whole."""
    narrow = NARROW if name == "seed_2d" and not whole else ()
    return config(f"experiment={name}", "train.dtype=float64", *narrow, *overrides, small=False)


def job(world: World, cfg: Config) -> tuple[str, RunTrace | None]:
    return digested(trace_run(cfg, prepare(cfg.data, cfg.tokenizer), world, STEPS), world.rank)


@cache
def one_process(name: str, *overrides: str) -> RunTrace:
    cfg = experiment(name, *overrides)
    found = reference(cfg, prepare(cfg.data, cfg.tokenizer), STEPS)
    assert all(
        g.abs().max() > 0 for step in found.steps for n, g in step.gradients.items() if "norm" not in n
    )
    return found


@cache
def on_ranks(ranks: Ranks, size: int, name: str, *overrides: str) -> tuple[RunTrace, bool]:
    """Rank 0's trace, and whether all ranks have the same one."""
    return traced(ranks, size, job, experiment(name, *overrides))


def differing(ours: RunTrace, theirs: RunTrace) -> set[str]:
    return set(out_of_tolerance(compare(ours, theirs), Dtype.float64))


@pytest.mark.parametrize(("name", "count"), [("seed_tp", 517), ("seed_sp", 517), ("seed_2d", 18_089_216)])
def test_the_models_have_the_scripts_sizes(name: str, count: int) -> None:
    model = meta_model(experiment(name, whole=True).model)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *(("seed_tp", 4), ("seed_sp", 4), ("seed_2d", 4)),
        *(exhaustive(name, 2) for name in ("seed_tp", "seed_sp", "seed_2d")),
    ],
)
def test_each_script_equals_one_process(ranks: Ranks, name: str, size: int) -> None:
    ours, same = on_ranks(ranks, size, name)
    assert same
    assert differing(ours, one_process(name)) == set()


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        exhaustive("seed_2d", ["train.loss=sum"]),
        ("seed_2d", ["train.loss=sum", "parallel.loss_parallel=false", "model.blocks=[]"]),
        exhaustive("seed_2d", ["parallel.loss_parallel=false"]),
        exhaustive("seed_2d", ["model.blocks=[]"]),
        exhaustive("seed_2d", ["parallel=tp", "mesh=auto"]),
        ("seed_2d", ["parallel=hsdp_tp", "mesh=auto"]),
        ("seed_sp", ["parallel.loss_parallel=false"]),
        exhaustive("seed_sp", ["train.micro_batch_size=8"]),
        ("seed_sp", ["parallel=fsdp_tp", "train.micro_batch_size=20"]),
        ("seed_tp", ["parallel=fsdp"]),
        exhaustive("seed_tp", ["parallel=ddp"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_other_choices_change_no_number(ranks: Ranks, name: str, overrides: list[str]) -> None:
    ours, same = traced(ranks, 4, job, experiment(name, *overrides))
    assert same
    science = [o for o in overrides if o.startswith("train.loss")]
    assert differing(ours, one_process(name, *science)) == set()


@pytest.mark.parametrize("plan", [exhaustive("tp"), "sp", "fsdp"])
def test_rows_of_numbers_go_through_bfloat16(ranks: Ranks, plan: str) -> None:
    cfg = experiment("seed_sp", f"parallel={plan}", "train.dtype=bfloat16")
    ours, same = traced(ranks, 2, job, cfg)
    alone = reference(cfg, prepare(cfg.data, cfg.tokenizer), STEPS)
    assert same
    first = (ours.steps[0].loss, alone.steps[0].loss)
    assert first[0] == pytest.approx(first[1], rel=0.05)


# The mistakes.


@pytest.mark.parametrize(
    ("name", "size"), [("seed_tp", 2), exhaustive("seed_sp", 4), exhaustive("seed_2d", 4)]
)
def test_weights_of_each_rank_are_other_weights(ranks: Ranks, name: str, size: int) -> None:
    ours, same = traced(ranks, size, job, experiment(name, "defects.weights_per_rank=true"))
    # Each shard is in one place, and what is whole on several starts from a constant or from one rank.
    assert same
    assert "initial weights" in differing(ours, one_process(name))


def test_replicas_with_weights_of_their_own_are_different_models(ranks: Ranks) -> None:
    ours, same = traced(ranks, 2, job, experiment("seed_tp", "parallel=ddp", "defects.weights_per_rank=true"))
    assert not same
    assert "between ranks" in differing(ours, one_process("seed_tp"))


def test_kept_gradients_are_right_for_one_step_and_wrong_from_the_second(ranks: Ranks) -> None:
    ours, same = on_ranks(ranks, 4, "seed_2d", "defects.keep_gradients=true")
    right = one_process("seed_2d")
    assert same
    assert {"grad norm", "gradients", "weights"} <= differing(ours, right)
    first, second = ours.steps[:2]
    for name, gradient in right.steps[0].gradients.items():
        torch.testing.assert_close(first.gradients[name], gradient, rtol=0, atol=1e-10)
    assert compare(ours, right)["gradients"].step == 1
    assert second.loss == pytest.approx(right.steps[1].loss, rel=1e-10)  # it shows in the weights that follow


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("seed_tp", []),
        exhaustive("seed_sp", []),
        ("seed_2d", []),
        exhaustive("seed_2d", ["parallel=sp", "mesh=auto"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else value,
)
def test_kept_gradients_are_kept_alike_under_every_plan(ranks: Ranks, name: str, plan: list[str]) -> None:
    ours, _ = on_ranks(ranks, 4, name, *plan, "defects.keep_gradients=true")
    alone = job(World(), experiment(name, "parallel=none", "mesh=auto", "defects.keep_gradients=true"))[1]
    assert alone is not None
    assert differing(ours, alone) == set()


def test_kept_gradients_are_the_sum_of_all_so_far() -> None:
    kept = job(
        World(), experiment("seed_tp", "parallel=none", "defects.keep_gradients=true", "optimizer.lr=1e-30")
    )[1]
    right = job(World(), experiment("seed_tp", "parallel=none", "optimizer.lr=1e-30"))[1]
    assert kept is not None
    assert right is not None
    for name, last in kept.steps[-1].gradients.items():
        torch.testing.assert_close(last, sum(step.gradients[name] for step in right.steps))


def test_overlapping_batches_are_read_twice_and_change_the_loss(ranks: Ranks) -> None:
    cfg = experiment("seed_2d", "defects.overlapping_batches=true")
    rows, honest = (Batches(prepare(cfg.data, cfg.tokenizer), 16, 0) for _ in range(2))
    OverlappingBatches(rows).start(TrainState(0, torch.nn.Identity(), torch.optim.SGD([torch.zeros(1)])))
    for step in range(3):
        assert torch.equal(rows.batch(step, 1, 2).inputs, rows.batch(step + 1, 0, 2).inputs)
        assert torch.equal(rows.batch(step, 0, 2).inputs, honest.batch(step, 0, 2).inputs)
        assert not torch.equal(rows.batch(step, 1, 2).inputs, honest.batch(step, 1, 2).inputs)
    found = differing(traced(ranks, 4, job, cfg)[0], one_process("seed_2d"))
    assert {"loss", "gradients"} < found
    assert "initial weights" not in found


# What they send.


def measured(cfg: Config, size: int) -> list[Entry]:
    """What rank 0 sends, counted on the fake process group."""
    return count(World(size=size, local_size=size), cfg, FAKE, prepare(cfg.data, cfg.tokenizer)).sent


def expected(cfg: Config, world: int) -> list[Entry]:
    found = expected_entries(*plan_model(cfg, validate(cfg, world)), cfg)
    assert found is not None
    return found


COUNTED = [
    ("seed_tp", []),
    ("seed_tp", ["parallel=fsdp"]),
    ("seed_sp", []),
    ("seed_sp", ["parallel.loss_parallel=false"]),
    ("seed_sp", ["train.dtype=bfloat16", "train.micro_batch_size=20"]),
    ("seed_2d", []),
    ("seed_2d", ["train.loss=sum"]),
    ("seed_2d", ["train.loss=sum", "parallel.loss_parallel=false"]),
    ("seed_2d", ["model.blocks=[]"]),
    ("seed_2d", ["defects.keep_gradients=true"]),
]


@pytest.mark.parametrize(
    ("name", "overrides", "size"),
    [
        (pytest.param if (nth + second) % 2 else exhaustive)(*case, size)
        for nth, case in enumerate(COUNTED)
        for second, size in enumerate((4, 2))
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_measured_is_expected(name: str, overrides: list[str], size: int) -> None:
    cfg = experiment(name, *overrides)
    assert measured(cfg, size) == expected(cfg, size) != []


def sent(cfg: Config, axis: str) -> dict[tuple[str, str], tuple[int, int]]:
    """(phase, collective) -> (count, bytes of the whole tensors), for 4 ranks."""
    return {(e.phase, e.collective): (e.count, e.tensor_bytes) for e in expected(cfg, 4) if e.axis == axis}


FLOAT32 = "train.dtype=float32"


def test_the_toy_scripts_send_what_their_tutorial_says() -> None:
    """One all-reduce at the end; and for rows of each rank's own, an all-gather and a reduce-scatter."""
    assert sent(experiment("seed_tp", FLOAT32), "tp") == {
        ("forward", "all_reduce"): (1, 20 * 5 * 4),
        ("clip", "all_reduce"): (1, 4),
    }
    assert sent(experiment("seed_sp", FLOAT32), "tp") == {
        ("forward", "all_gather"): (1, 80 * 10 * 4),
        ("forward", "reduce_scatter"): (1, 80 * 5 * 4),
        ("loss", "all_reduce"): (1, 4),
        ("backward", "all_gather"): (1, 80 * 5 * 4),
        ("clip", "all_reduce"): (1, 4),
    }


def test_gathered_logits_are_most_of_what_is_sent() -> None:
    """8 x 256 tokens of 32,000 logits in float32, gathered by each of two tp ranks, where the loss needs 24 kB."""
    gathers, shards = (
        sent(experiment("seed_2d", FLOAT32, f"parallel.loss_parallel={on}", whole=True), "tp")
        for on in ("false", "true")
    )
    logits, activations = 8 * 256 * 32000 * 4, 8 * 256 * 256 * 4
    assert gathers["forward", "all_gather"] == (6, logits + 5 * activations)
    assert shards["forward", "all_gather"] == (5, 5 * activations)
    assert shards["loss", "all_reduce"] == (3, 3 * 8 * 256 * 4)
    assert not [phase for phase, _ in gathers if phase == "loss"]
    summed = sent(experiment("seed_2d", FLOAT32, "train.loss=sum", whole=True), "tp")
    assert summed["loss", "all_reduce"] == (1, 4)


def test_one_root_unit_gathers_everything_at_once_and_once() -> None:
    """Each of two tp ranks has half of 18,089,216 weights, norms apart, which are whole: 5 x 256. By unit: two blocks,
    the second with the last norm, embedding and output."""
    by_unit, at_once = (
        sent(experiment("seed_2d", FLOAT32, *blocks, whole=True), "dp_shard")
        for blocks in ((), ("model.blocks=[]",))
    )
    weights = ((18_089_216 - 5 * 256) // 2 + 5 * 256) * 4
    block = ((4 * 256 * 256 + 3 * 256 * 768) // 2 + 2 * 256) * 4
    assert by_unit["forward", "all_gather"] == (4, weights)
    assert by_unit["backward", "all_gather"] == (1, block)  # the last one's weights stay for it
    assert at_once["forward", "all_gather"] == (1, weights)
    assert ("backward", "all_gather") not in at_once
    assert at_once["backward", "reduce_scatter"] == (1, weights)
