"""The planner: what is legal, what other rows per micro-batch would do, and why losers lose."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.composed import config
from support.marks import exhaustive
from support.nets import model
from support.odd_nets import Asking, InPlace
from tqdm import tqdm

from tpresearch.config.axes import MeshSizes
from tpresearch.config.errors import ConfigError, WrongModel
from tpresearch.config.schema import Config, MeshConfig
from tpresearch.config.validate import micro_batches, tokens_per_step, validate
from tpresearch.config.world import World
from tpresearch.launch import Run
from tpresearch.launch.composition import conf_dir, read_option
from tpresearch.launch.stop import Stopped
from tpresearch.planner import __main__ as planner
from tpresearch.planner import ranking
from tpresearch.planner.__main__ import preflight_planner
from tpresearch.planner.candidates import Candidate, candidate_plans, micro_batch_rows
from tpresearch.planner.ranking import RankedCandidate, Ranking, _predict_all, rank
from tpresearch.planner.report import (
    EXPERIMENT,
    advice,
    as_json,
    draw,
    not_used,
    report,
    training_command,
    why_slower,
)
from tpresearch.simulate import depth
from tpresearch.simulate.cluster import Cluster, parse_cluster
from tpresearch.simulate.compiled_blocks import CompiledBlock
from tpresearch.simulate.depth import Recording, recording
from tpresearch.simulate.fake_step import record
from tpresearch.simulate.prediction import Prediction, predict, step_seconds
from tpresearch.simulate.preflight import SimulationPreflight
from tpresearch.simulate.rows import FEW_ROWS, MORE_ROWS, with_rows
from tpresearch.simulate.trace import Change, Trace
from tpresearch.verify.ranks import Ranks

WORLDS = {"ddp": 4, "fsdp": 4, "hsdp": 4, "sp": 2, "fsdp_tp": 4, "hsdp_tp": 8}


def cluster(**changed: float) -> Cluster:
    plain = read_option("cluster", "h100_dgx")
    for name, value in changed.items():
        plain["numbers"][name]["value"] = value
    return parse_cluster(plain)


def at_rows(cfg: Config, rows: int, batch: int) -> Config:
    train = dataclasses.replace(cfg.train, micro_batch_size=rows, global_batch_size=batch)
    return dataclasses.replace(cfg, train=train)


def equal(told: Trace | None, real: Trace, cfg: Config, sizes: MeshSizes) -> None:
    """Op by op and byte by byte, what is held at each moment by kind, and what it takes, which kernels read again counting."""
    assert told
    for mine, theirs in zip(told.recorded, real.recorded, strict=True):
        assert [(o.name, o.shape, o.event, o.bytes_moved) for o in mine] == [
            (o.name, o.shape, o.event, o.bytes_moved) for o in theirs
        ]
    assert told.memory == real.memory
    assert step_seconds(told, cfg, sizes, cluster()) == step_seconds(real, cfg, sizes, cluster())


@pytest.mark.parametrize(("plan", "rows", "chunk"), [("sp", 5, "null"), ("fsdp", 8, "32"), ("ddp", 8, "64")])
def test_rows_per_micro_batch_follow_from_two_and_four(plan: str, rows: int, chunk: str) -> None:
    """With a loss of all tokens at once, of two chunks per row, and of a chunk per row."""
    cfg = config("model=llama2_debug", f"parallel={plan}", "data.seq_len=64", f"train.loss_chunk={chunk}")
    sizes = validate(at_rows(cfg, 1, 4), 2)
    few, more, real = (record(at_rows(cfg, r, 2 * r * sizes.dp), sizes) for r in (FEW_ROWS, MORE_ROWS, rows))
    equal(with_rows(few, more, rows), real, at_rows(cfg, rows, 64), sizes)


@pytest.mark.parametrize("plan", ["fsdp", "sp"])
def test_a_single_micro_batch_adds_to_no_gradients(plan: str) -> None:
    """Two are recorded; of one, the first stands for it."""
    cfg = config("model=llama2_debug", f"parallel={plan}")
    single = at_rows(cfg, 2, 2 * validate(at_rows(cfg, 2, 4), 2).dp)
    sizes = validate(single, 2)
    two, one = record(at_rows(cfg, 2, 4 * sizes.dp), sizes), record(single, sizes)
    assert [(op.name, op.bytes_moved) for op in two.ops(1)] == [
        (op.name, op.bytes_moved) for op in one.ops(1)
    ]
    assert step_seconds(two, single, sizes, cluster()) == step_seconds(one, single, sizes, cluster())


@pytest.mark.parametrize(("plan", "rows"), [("ddp", 2), ("hsdp", 4)])
def test_of_a_single_micro_batch_that_replicas_sum_nothing_is_added_to(plan: str, rows: int) -> None:
    """As in the simulator, where a float32 sum of gradients is the larger part of a small step."""
    cfg = config("model=llama2_debug", f"parallel={plan}", "train.dtype=float32")
    single = at_rows(cfg, 1, rows * 4)
    sizes = validate(single, 4)
    known = recording(single, sizes)
    *_, found = ranking._predict_each_micro_batch(Candidate(single, sizes), known, cluster())
    assert micro_batches(found.candidate.cfg, sizes) == 1
    real = predict(recording(found.candidate.cfg, sizes), cluster())
    assert found.prediction.step_time_s == real.step_time_s
    assert found.prediction.peak_bytes == real.peak_bytes


def test_of_two_micro_batches_the_second_holds_what_replicas_sum() -> None:
    """Three are recorded, whose tokens it holds; the last sums. A plan holds most while it does."""
    cfg = config("model=llama2_debug", "parallel=ddp", "train.dtype=bfloat16")
    family = at_rows(cfg, 1, 8)
    sizes = validate(family, 2)
    *_, found, _ = ranking._predict_each_micro_batch(
        Candidate(family, sizes), recording(family, sizes), cluster()
    )
    assert micro_batches(found.candidate.cfg, sizes) == 2
    real = predict(recording(found.candidate.cfg, sizes), cluster())
    tokens = 2 * cfg.data.seq_len
    assert found.prediction.peak_bytes == real.peak_bytes + 2 * tokens * 8


def test_where_shallow_models_do_not_tell_of_a_deep_one_the_best_is_that_of_the_simulator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Here what the first blocks wait for the link hides launches of the others."""
    words = ["model=llama2_debug", "model.n_layers=5", "model.dim=256", "tokenizer.vocab_size=32000"]
    cfg = config(*words, "train.dtype=bfloat16", "train.global_batch_size=4")
    slow = cluster(intra_gb_s=25)
    plans = [one for one in candidate_plans(cfg, 2, slow) if "=fsdp" in str(one.overrides)]
    monkeypatch.setattr(ranking, "candidate_plans", lambda *_: iter(plans[:1]))
    best = rank(cfg, 2, slow).fits[0]
    told = predict(recording(best.candidate.cfg, best.candidate.sizes), slow, check=False)
    real = predict(recording(best.candidate.cfg, best.candidate.sizes), slow)
    assert abs(told.step_time_s / real.step_time_s - 1) > 0.005
    assert best.prediction.step_time_s == real.step_time_s


@pytest.mark.parametrize(
    ("plans", "kind"),
    [
        (("sp", "hsdp_tp"), "selective"),
        exhaustive(("sp", "fsdp_tp", "hsdp_tp"), "selective"),
        exhaustive(("ddp", "fsdp", "hsdp"), "none"),
    ],
)
def test_a_block_is_compiled_once_for_plans_whose_data_axes_differ(
    plans: tuple[str, ...], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Since what it keeps and repeats is the same for each of them."""
    words = ("model=llama2_debug", "model.n_layers=6", "parallel.compile=true")
    families = []
    for plan in plans:
        mesh = [*["mesh.dp_replicate=2"] * ("hsdp" in plan), *["mesh.tp=2"] * ("tp" in plan)]
        cfg = config(*words, f"parallel={plan}", f"parallel.activation_checkpointing={kind}", *mesh)
        families.append(Candidate(at_rows(cfg, 1, 16), validate(at_rows(cfg, 1, 16), WORLDS[plan])))
    assert len({ranking._block_of(family) for family in families}) == 1
    known = [recording(family.cfg, family.sizes) for family in families]
    assert len({(one.block.saved_bytes_per_row, one.block.recomputed) for one in known}) == 1
    asked: list[MeshSizes] = []

    def noted(cfg: Config, sizes: MeshSizes) -> CompiledBlock:
        asked.append(sizes)
        return known[0].block

    def ask(family: Candidate, known: Recording, *_: object) -> list[CompiledBlock]:
        return [known.compiler(family.cfg, family.sizes)]

    monkeypatch.setattr(ranking, "_predict_each_micro_batch", ask)
    counting = dataclasses.replace(known[0], compiler=noted)
    assert len(ranking._predict_alike(families, counting, cluster())) == len(families)
    assert len(asked) == 1


def test_steps_that_do_something_else_at_more_rows_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """At eight rows a chunk of the loss is as long as at two and four, or the step is recorded; and so with other ops."""
    asked: list[int] = []

    def noted(cfg: Config, sizes: MeshSizes, _: object = None) -> Trace:
        asked.append(cfg.train.micro_batch_size or 0)
        return record(cfg, sizes)

    monkeypatch.setattr(ranking, "record", noted)
    for chunk, recorded in (
        ("64", [2, 4]),
        ("200", [8]),
        ("44", [8]),
    ):  # 64 tokens each; 128, 128 and 171; 43 or 42
        cfg = config("model=llama2_debug", "parallel=ddp", "data.seq_len=64", f"train.loss_chunk={chunk}")
        sizes = validate(at_rows(cfg, 1, 32), 2)
        family = Candidate(at_rows(cfg, 1, 32), sizes)
        traces = ranking._Traces(family)
        asked.clear()
        traces.trace(family.with_micro_batch(8).cfg, sizes, None)
        assert sorted(asked) == recorded


def test_a_chunk_of_the_loss_that_holds_more_than_it_found_tells_of_no_other() -> None:
    def held(*sizes: int) -> Trace:
        return Trace((), (), {}, tuple(Change("1 loss", "activations", size) for size in sizes))

    for left, is_told in ((0, True), (8, False)):
        assert (with_rows(held(64, -64), held(64, -64, 32, left - 32), 8) is not None) == is_told


def test_all_that_is_legal_is_a_candidate() -> None:
    cfg = config("model=llama2_debug", "train.global_batch_size=64")  # 4 heads, 2 of keys and values
    found = list(candidate_plans(cfg, 16, cluster()))
    words = [one.overrides for one in found if isinstance(one, Candidate)]
    assert len(words) == len(set(words))
    assert (
        "parallel=fsdp mesh.dp_shard=16 parallel.activation_checkpointing=none train.micro_batch_size=1"
        in words
    )
    assert not any("mesh.dp_replicate=4" in w for w in words)  # replicas are of a host of 8 at least
    assert any("mesh.dp_replicate=2 mesh.dp_shard=4 mesh.tp=2" in w for w in words)
    assert not any("parallel=none" in w for w in words)
    assert micro_batch_rows(next(one for one in found if isinstance(one, Candidate))) == [1, 2, 4]


def test_micro_batches_and_tp_of_other_sizes_than_powers_of_two() -> None:
    """60 rows per rank, of which 5 are hardly another size than 4; hosts of 6 devices, 12 heads."""
    cfg = config(
        "model=llama2_debug",
        "model.n_heads=12",
        "model.n_kv_heads=12",
        "model.dim=48",
        "data.seq_len=48",
        "train.global_batch_size=720",
    )
    hosts_of_six = dataclasses.replace(cluster(), devices_per_host=6)
    found = [one for one in candidate_plans(cfg, 12, hosts_of_six) if isinstance(one, Candidate)]
    assert {one.sizes.tp for one in found} == {1, 2, 3, 6}
    plain = next(one for one in found if one.cfg.parallel.name == "fsdp")
    assert micro_batch_rows(plain) == [1, 2, 3, 4, 6, 10, 15, 20, 30, 60]


def test_replicas_of_many_hosts_are_candidates_where_there_are_many_more() -> None:
    cfg = config("model=llama2_debug", "train.global_batch_size=1024")
    found = [one for one in candidate_plans(cfg, 1024, cluster()) if isinstance(one, Candidate)]
    meshes = {(one.sizes.tp, one.sizes["dp_shard"]) for one in found if one.sizes["dp_replicate"] > 1}
    assert {(1, 8), (1, 64), (1, 512), (2, 4), (2, 32), (2, 256)} <= meshes


def test_candidates_are_ranked_with_reasons(ranks: Ranks, tmp_path: Path) -> None:
    """Its workers are forks of the ranks' server, which is there."""
    cfg = config("model=llama2_debug", "train.global_batch_size=2")
    ranked = rank(cfg, 2, cluster(), workers=2)
    speeds = [one.speed for one in ranked.fits]
    assert speeds == sorted(speeds, reverse=True)
    assert len(ranked.fits) == 9  # ddp, fsdp and sp, each with three kinds of checkpointing
    plain = as_json(ranked)
    assert plain["fits"][0]["why"] == ""
    assert all(one["why"] for one in plain["fits"][1:])
    front = [one for one in plain["fits"] if one["on_front"]]
    peaks = [one["memory_bytes"]["peak"] for one in front]
    assert peaks == sorted(peaks, reverse=True)
    best = ranked.fits[0].candidate
    text = report(
        ranked, "llama2_debug", 2, "h100_dgx", training_command(best, [], cluster(), MeshConfig(), {})
    )
    assert "tensor parallelism" in text
    assert f"--nproc-per-node=2 train.py experiment=pretraining {best.overrides}" in text
    draw(ranked, "title", tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 10_000


def locks_of_bars(_: Candidate) -> list[Any]:
    return [type(tqdm.get_lock()).__module__]


def test_a_worker_that_is_killed_leaves_no_semaphore_of_a_progress_bar(ranks: Ranks) -> None:
    """Its workers are forks of the ranks' server, which is there."""
    possible = [
        one
        for one in candidate_plans(config("model=llama2_debug"), 2, cluster())
        if isinstance(one, Candidate)
    ]
    assert _predict_all(locks_of_bars, possible[:2], 2) == [["_thread"], ["_thread"]]


def test_sigterm_ends_it_as_ctrl_c_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an exception, so that its workers end and their semaphores are removed."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    monkeypatch.setattr(ranking, "rank", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    monkeypatch.setattr(planner, "chosen_files", lambda _: [])
    cfg = config("gpus=2", "model=llama2_debug", small=False, program="planner")
    try:
        with pytest.raises(Stopped):
            planner.main.main(preflight_planner(cfg, World()), Run(tmp_path, World()))
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_model_that_cannot_be_recorded_is_refused_by_a_worker_too(ranks: Ranks) -> None:
    """Its workers are forks of the ranks' server, which is there."""
    cfg = config(*model(Asking), "train.global_batch_size=2")
    with pytest.raises(ConfigError, match="depends on the values of data") as refused:
        rank(cfg, 2, cluster(), workers=2)
    assert isinstance(refused.value, WrongModel)


def test_what_some_plans_cannot_do_with_a_model_leaves_the_others() -> None:
    cfg = config(*model(InPlace), "train.global_batch_size=4")
    found = rank(cfg, 2, cluster())
    assert {one.candidate.sizes.tp for one in found.fits} == {1}
    kinds = {str(one.candidate.cfg.parallel.activation_checkpointing) for one in found.fits}
    assert kinds == {"none", "full"}
    why = {one.why for one in found.refused if one.error}
    assert any("changes in place the output of a matmul" in one for one in why)
    assert any("on a rank's shards ends at" in one for one in why)
    assert found.count == len(found.fits) + len(found.refused)


def test_devices_that_would_hold_a_model_are_those_of_the_cluster() -> None:
    cfg = config("model=llama2_debug", "data.seq_len=64", "train.global_batch_size=64")
    small = cluster(memory_gb=2.5e-4, memory_reserved_gb=0)
    enough = rank(cfg, 8, small).enough
    assert enough
    assert enough > 8
    reserving = rank(cfg, 8, cluster(memory_gb=1 + 2.5e-4, memory_reserved_gb=1))
    assert (reserving.enough, reserving.too_large) == (enough, [])
    assert rank(cfg, 8, dataclasses.replace(small, hosts=enough // 8)).enough == enough
    assert rank(cfg, 8, dataclasses.replace(small, hosts=enough // 8 - 1)).enough is None


def predicted(
    step_time_s: float, time_s: dict[str, float] | None = None, peak_bytes: int = 0
) -> RankedCandidate:
    """A candidate whose step takes that long and holds that much."""
    cfg, sizes = config("model=llama2_debug"), MeshSizes()
    seconds, memory = {"step": step_time_s, **(time_s or {})}, {"reserved": peak_bytes}
    prediction = Prediction(cluster(), sizes, cfg, seconds, 0.0, [], memory)
    return RankedCandidate(Candidate(cfg, sizes), prediction)


def test_a_slower_candidate_is_not_said_to_be_as_fast() -> None:
    """It loses a little in each kind of op, of which none takes a percent more."""

    def candidate(*seconds: float) -> RankedCandidate:
        return predicted(sum(seconds), time_s=dict(zip(("gemm", "copy", "attention"), seconds, strict=True)))

    best = candidate(0.8, 0.1, 0.1)
    assert why_slower(candidate(0.805, 0.1, 0.1), best) == "as fast, within a percent"
    assert why_slower(candidate(0.809, 0.108, 0.1), best) == "matmuls +0.9%"
    assert why_slower(candidate(0.9, 0.15, 0.1), best) == "matmuls +10.0%, FSDP's copies +5.0%"


def test_the_command_of_the_best_one_is_whole_and_valid(tmp_path: Path) -> None:
    """What was typed and is not the planner's to choose, what it composes besides, and what it chose."""
    cfg = config("model=llama2_debug", "train.global_batch_size=64")
    best = next(one for one in candidate_plans(cfg, 16, cluster()) if isinstance(one, Candidate))
    typed = ["gpus=16", "model=llama2_debug", "train.global_batch_size=64", "data.seq_len=64"]
    own = [f"hydra.searchpath=[file://{tmp_path}]", "parallel.compile=true"]
    typed += ["parallel.activation_checkpointing=full", "cluster.numbers.memory_gb.value=1"]
    typed += ["hydra.run.dir=plans", *own]
    command = training_command(best, typed, cluster(), MeshConfig(), {})
    assert (command.hosts, command.ranks) == (2, 8)
    assert list(command.arguments[:6]) == [f"experiment={EXPERIMENT}", *typed[1:4], *own]
    assert " ".join(command.arguments[6:]) == best.overrides
    assert validate(config(*command.arguments), 16, command.hosts) == best.sizes
    composed = yaml.safe_load((conf_dir() / "planner.yaml").read_text())["defaults"]
    assert {"experiment": EXPERIMENT} in composed


@pytest.mark.parametrize("experiment", ["plans", "seed_2d"])
def test_the_command_trains_what_was_planned_whatever_an_experiment_composes(experiment: str) -> None:
    """Of a data set and a tokenizer it may say nothing, where train.py has other defaults; or set a size of the mesh."""
    words = ["gpus=4", f"experiment={experiment}", "train.global_batch_size=16"]
    job = preflight_planner(config(*words, small=False, program="planner"), World())
    options = {"model": job.cfg.model.name, "data": "random_tokens", "tokenizer": "bpe_32k"}
    for one in candidate_plans(job.cfg, 4, job.cluster):
        assert isinstance(one, Candidate)
        command = training_command(one, words, job.cluster, job.cfg.mesh, options)
        trained = config(*command.arguments, small=False)
        assert validate(trained, 4) == one.sizes
        for part in ("model", "data", "tokenizer", "optimizer", "schedule", "train", "parallel"):
            assert getattr(trained, part) == getattr(one.cfg, part), part


@pytest.mark.parametrize(
    ("name", "world", "started"),
    [
        ("gb200_nvl72", 64, (16, 4)),
        ("gb300_nvl72", 128, (32, 4)),
        ("gb300_nvl72", 6, (2, 3)),
        ("gb200_nvl72", 2, (1, 2)),
        ("h100_dgx", 16, (2, 8)),
        ("h100_dgx", 6, (1, 6)),
        ("h100_dgx", 1, (1, None)),
    ],
)
def test_one_torchrun_starts_the_ranks_of_a_tray_of_a_rack(
    name: str, world: int, started: tuple[int, int | None]
) -> None:
    here = parse_cluster(read_option("cluster", name))
    cfg = config("model=llama2_debug", "train.global_batch_size=768")
    best = next(one for one in candidate_plans(cfg, world, here) if isinstance(one, Candidate))
    command = training_command(best, [], here, MeshConfig(), {})
    assert (command.hosts, command.ranks) == started


def test_overrides_of_what_the_planner_chooses_are_named() -> None:
    chosen = ["parallel=tp", "mesh.tp=2", "train.micro_batch_size=2", "world_size=8"]
    used = ["gpus=4", "model=llama2_debug", "parallel.compile=true", "train.seed=1"]
    said = not_used([*used, *chosen])
    assert said
    assert said.startswith(f"not used, since the planner compares plans for gpus: {' '.join(chosen)}; ")
    assert not_used(used) is None


def test_a_trace_is_of_one_plan() -> None:
    """It is neither drawn here nor passed on to the training, and on one device there is no tensor parallelism to weigh."""
    ranked = rank(config("model=llama2_debug", "train.global_batch_size=2"), 1, cluster())
    best, typed = ranked.fits[0].candidate, ["trace=true", "gpus=1", "model=llama2_debug"]
    assert "trace" not in str(training_command(best, typed, cluster(), MeshConfig(), {}))
    said = not_used(typed)
    assert said
    assert said.startswith("not used, since the planner compares plans for gpus: trace=true; for one plan, ")
    (about,) = advice(ranked, 1, "llama2_debug")
    assert about.startswith("on one device there is nothing to shard")


def test_a_model_of_very_many_ops_is_said_to_take_long(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is recorded at few blocks by what these run."""
    cfg = config("model=llama2_debug", "model.n_layers=40", "parallel=none", "train.micro_batch_size=1")
    for most, says in ((1000, False), (100, True)):
        monkeypatch.setattr(depth, "MANY_OPS", most)
        caplog.clear()
        recording(cfg, validate(cfg, 1))
        assert ("recorded one by one, which takes long" in caplog.text) is says


def test_rules_without_sequence_parallelism_are_used_where_there_are_no_others() -> None:
    cfg = config("model=llama2_debug", "data.seq_len=127", "train.global_batch_size=64")
    found = [one for one in candidate_plans(cfg, 4, cluster()) if isinstance(one, Candidate)]
    words = {one.overrides.partition(" parallel.activation")[0] for one in found if one.sizes.tp > 1}
    assert words == {
        "parallel=tp mesh.tp=4",
        "parallel=fsdp_tp mesh.dp_shard=2 mesh.tp=2 parallel.tensor=tp",
    }, words


def test_it_says_when_nothing_fits() -> None:
    """Its 622,912 parameters take 16 bytes each: 1.25 MB on each of 8 devices, 0.62 on 16, where 1 is free."""
    cfg = config("model=llama2_debug", "train.global_batch_size=64", "tokenizer.vocab_size=4096")
    ranked = rank(cfg, 2, cluster(memory_gb=0.001, memory_reserved_gb=0))
    assert not ranked.fits
    said = advice(ranked, 2, "llama2_debug")
    assert said == ["llama2_debug does not fit on 2 devices; 16 would hold its state"]
    assert any("weights, gradients and optimizer state alone" in one.why for one in ranked.refused)


def test_what_no_plan_can_do_is_refused_and_what_one_can_is_not() -> None:
    """16 rows split over 64 GPUs where tp takes at least 4; 12, 24 and very many GPUs take other hosts and batches."""
    plain = read_option("cluster", "h100_dgx")

    def judged(gpus: int, rows: int) -> SimulationPreflight:
        found = config("model=llama2_small", "data.seq_len=128", f"train.global_batch_size={rows}")
        return preflight_planner(dataclasses.replace(found, gpus=gpus, cluster=plain), World())

    found = judged(64, 16)
    assert (found.sizes.world, found.cfg.train.global_batch_size) == (64, 16)
    for gpus, rows, field in (
        (12, 24, "gpus=12: hosts of"),
        (24, 16, "train.global_batch_size=16: does not split over 24"),
        # These rows split with tp=8 alone, which does not divide 12 heads.
        (24, 9, "train.global_batch_size=9: does not split over 24"),
        # Of which a common multiple is too large.
        (999_992, 1024, "train.global_batch_size=1024: does not split over 999992"),
    ):
        with pytest.raises(ConfigError, match=f"^{field}"):
            judged(gpus, rows)


@pytest.mark.parametrize(
    ("words", "plans"),
    [
        (["gpus=2", "optimizer.split_masters=true"], {"ddp", "sp"}),
        (["gpus=2", "parallel.async_tp=true", "parallel.compile=true"], {"sp"}),
        (["gpus=1", "parallel.gradient_accumulation_fusion=true"], {"none"}),
    ],
)
def test_an_option_of_some_plans_is_planned_for_with_these(words: list[str], plans: set[str]) -> None:
    """And with the micro-batches of which each is a valid config."""
    cfg = config(*words, "train.global_batch_size=16", small=False, program="planner")
    job = preflight_planner(cfg, World())
    found = [
        one for one in candidate_plans(job.cfg, job.sizes.world, job.cluster) if isinstance(one, Candidate)
    ]
    assert {one.cfg.parallel.name for one in found} == plans
    for one in found:
        for rows in micro_batch_rows(one):
            assert validate(one.with_micro_batch(rows).cfg, one.sizes.world) == one.sizes


def test_an_option_that_no_plan_has_here_is_refused() -> None:
    for words, why in (
        (["optimizer.split_masters=true", "train.dtype=float32"], "train.dtype=float32 computes with"),
        (["parallel.async_tp=true"], "async TP requires parallel.compile=true"),
        (["parallel.gradient_accumulation_fusion=true"], "gradients are sharded, summed over ranks"),
    ):
        with pytest.raises(ConfigError, match=why):
            preflight_planner(config("gpus=2", *words, small=False, program="planner"), World())


def test_ranks_that_are_typed_as_world_size_are_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The default of gpus would be planned for instead. An experiment may say how many ranks train it."""
    by_experiment = config("gpus=8", "experiment=plans", small=False, program="planner")
    assert preflight_planner(by_experiment, World()).sizes.world == 8
    monkeypatch.setattr("tpresearch.planner.__main__.typed_overrides", lambda: {"world_size": "16"})
    with pytest.raises(ConfigError, match=r"^world_size=16: the planner plans for gpus; gpus=16$") as refused:
        preflight_planner(dataclasses.replace(by_experiment, world_size=16), World())
    assert refused.value.fix == {"world_size": None, "gpus": 16}


def test_rows_of_numbers_do_not_count_as_sequences_of_the_experiment() -> None:
    words = ["gpus=4", "model=toy_net", "data=uniform", "train.loss=sum", "train.dtype=float32"]
    with pytest.raises(ConfigError, match=r"^data.seq_len=4096: a row of numbers is no sequence") as refused:
        preflight_planner(config(*words, small=False, program="planner"), World())
    assert refused.value.fix == {"data.seq_len": 1}
    job = preflight_planner(config(*words, "data.seq_len=1", small=False, program="planner"), World())
    assert tokens_per_step(job.cfg) == 1024


def test_that_no_plan_is_valid_is_not_called_a_lack_of_memory() -> None:
    """Three ranks: 16 rows do not split over them, nor do 4 heads."""
    ranked = rank(config("model=llama2_debug", "train.global_batch_size=16"), 3, cluster())
    assert list(advice(ranked, 3, "llama2_debug")) == [
        "no plan is valid for llama2_debug on 3 devices; the most common reason: "
        "train.global_batch_size=16: does not split over 3 data-parallel ranks"
    ]


@pytest.mark.parametrize(("most", "rows"), [(16, [2, 4, 8, 16]), (4, [2, 4, 8]), (1, [2, 1])])
def test_rows_grow_up_to_the_first_that_do_not_fit_and_one_is_for_where_two_do_not(
    monkeypatch: pytest.MonkeyPatch, most: int, rows: list[int]
) -> None:
    def told(known: Recording, *_: object) -> Prediction:
        asked = known.cfg.train.micro_batch_size or 0
        return predicted(1.0, peak_bytes=0 if asked <= most else 10**15).prediction

    monkeypatch.setattr(ranking, "predict", told)
    cfg = at_rows(config("model=llama2_debug", "parallel=none"), 1, 16)
    family = Candidate(cfg, validate(cfg, 1))
    every = ranking._predict_each_micro_batch(family, recording(cfg, family.sizes), cluster())
    assert [one.candidate.cfg.train.micro_batch_size for one in every] == rows


@pytest.mark.parametrize(
    ("plain_s", "tensor_s", "said"),
    [
        (1.0, 0.8, "tensor parallelism pays: +25.0% over the best plan without it (parallel="),
        (0.75, 1.0, "do not use tensor parallelism here: the best plan with it is 25.0% slower"),
        (1.01, 1.0, "tensor parallelism makes no difference here (+1.0%)"),
        (None, 1.0, "tensor parallelism is needed: no plan without it"),
        (1.0, None, "tensor parallelism is not an option here"),
    ],
)
def test_whether_tensor_parallelism_pays_is_told_by_the_best_with_it_and_without(
    plain_s: float | None, tensor_s: float | None, said: str
) -> None:
    fits = [
        dataclasses.replace(one, candidate=dataclasses.replace(one.candidate, sizes=sizes))
        for best_s, sizes in ((plain_s, MeshSizes(dp_shard=2)), (tensor_s, MeshSizes(tp=2)))
        if best_s
        for one in (predicted(best_s), predicted(2 * best_s))
    ]
    (found,) = advice(Ranking(fits=sorted(fits, key=lambda one: -one.speed)), 2, "llama2_debug")
    assert found.startswith(said)


def test_of_two_that_are_as_fast_the_one_that_holds_less_is_on_the_front() -> None:
    slow, heavy, light = (
        predicted(seconds, peak_bytes=peak) for seconds, peak in ((1.0, 5), (0.5, 9), (0.5, 7))
    )
    assert Ranking(fits=[heavy, light, slow]).pareto_front() == [light, slow]
