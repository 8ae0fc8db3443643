"""The planner: what is legal, what other rows per micro-batch would do, and why losers lose."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml
from support.composed import config

from tpresearch.config.schema import Config
from tpresearch.config.validate import validate
from tpresearch.planner.candidates import Candidate, families, micro_batch_rows
from tpresearch.planner.ranking import advice, rank
from tpresearch.planner.report import as_json, draw, report
from tpresearch.simulate.cluster import Cluster, cluster_of
from tpresearch.simulate.device_memory import fullest
from tpresearch.simulate.fake_step import record
from tpresearch.simulate.rows import FEW, MORE, with_block, with_rows
from tpresearch.simulate.trace import Trace

CLUSTER = Path(__file__).parents[2] / "conf" / "cluster" / "h100_dgx.yaml"


def cluster(**changed: float) -> Cluster:
    plain = yaml.safe_load(CLUSTER.read_text())
    for name, value in changed.items():
        plain["numbers"][name]["value"] = value
    return cluster_of(plain)


def at_rows(cfg: Config, rows: int, batch: int) -> Config:
    train = dataclasses.replace(cfg.train, micro_batch_size=rows, global_batch_size=batch)
    return dataclasses.replace(cfg, train=train)


def test_rows_per_micro_batch_follow_from_two_and_four() -> None:
    """Five rows, op by op and byte by byte, are what recording five rows gives."""
    cfg = config("model=llama2_debug", "parallel=sp")
    sizes = validate(at_rows(cfg, 1, 4), 2)
    few, more, five = (record(at_rows(cfg, rows, 2 * rows * sizes.dp), sizes) for rows in (FEW, MORE, 5))
    told = with_rows(few, more, 5)
    assert told
    for mine, real in zip((*told.micro_batches, told.end), (*five.micro_batches, five.end), strict=True):
        for ours, theirs in zip(mine, real, strict=True):
            assert (ours.name, ours.shape, ours.event) == (theirs.name, theirs.shape, theirs.event)
            assert [size for _, size in ours.reads] == [size for _, size in theirs.reads]
    peak, real_peak = (sum(fullest(trace.memory).values()) for trace in (told, five))
    assert peak == pytest.approx(
        real_peak, rel=0.05
    )  # the fullest point within a moment may move with the rows


def test_a_third_block_at_more_rows_follows_from_three_recorded_steps() -> None:
    """Op by op and byte by byte what recording it gives, FSDP's gathers and TP's collectives among them."""
    cfg = config("model=llama2_debug", "parallel=fsdp_tp", "parallel.activation_checkpointing=selective")
    sizes = validate(at_rows(cfg, 1, 8), 4)

    def at(depth: int, rows: int) -> Trace:
        args = {**cfg.model.args, "n_layers": depth}
        deep = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, args=args))
        return record(at_rows(deep, rows, 2 * rows * sizes.dp), sizes)

    real = at(3, MORE)
    told = with_block(at(2, FEW), at(3, FEW), at(2, MORE))
    assert told
    for mine, theirs in zip((*told.micro_batches, told.end), (*real.micro_batches, real.end), strict=True):
        assert [(o.name, o.shape, o.event, o.bytes_moved) for o in mine] == [
            (o.name, o.shape, o.event, o.bytes_moved) for o in theirs
        ]
    assert sum(fullest(told.memory).values()) == pytest.approx(sum(fullest(real.memory).values()), rel=0.02)


def test_all_that_is_legal_is_a_candidate() -> None:
    cfg = config("model=llama2_debug", "train.global_batch_size=64")  # 4 heads, 2 of keys and values
    found = list(families(cfg, 16, cluster()))
    words = [one.words for one in found if isinstance(one, Candidate)]
    assert len(words) == len(set(words))
    assert (
        "parallel=fsdp mesh.dp_shard=16 parallel.activation_checkpointing=none train.micro_batch_size=1"
        in words
    )
    assert any("parallel=hsdp_tp mesh.dp_replicate=4 mesh.dp_shard=2 mesh.tp=4" not in w for w in words)
    assert any("mesh.dp_replicate=2 mesh.dp_shard=4 mesh.tp=2" in w for w in words)
    assert not any("parallel=none" in w for w in words)
    assert micro_batch_rows(next(one for one in found if isinstance(one, Candidate))) == [1, 2, 4]


def test_candidates_are_ranked_with_reasons(tmp_path) -> None:
    cfg = config("model=llama2_debug", "train.global_batch_size=2")
    ranking = rank(cfg, 2, cluster(), workers=2)
    speeds = [one.speed for one in ranking.fits]
    assert speeds == sorted(speeds, reverse=True)
    assert len(ranking.fits) == 9  # ddp, fsdp and sp, each with three kinds of checkpointing
    plain = as_json(ranking)
    assert plain["fits"][0]["why"] == ""
    assert all(one["why"] for one in plain["fits"][1:])
    front = [one for one in plain["fits"] if one["on_front"]]
    peaks = [one["memory_bytes"]["peak"] for one in front]
    assert peaks == sorted(peaks, reverse=True)
    text = report(ranking, "llama2_debug", 2, "h100_dgx")
    assert "tensor parallelism" in text
    assert front[0]["plan"] in text
    draw(ranking, "title", tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 10_000


def test_it_says_when_nothing_fits() -> None:
    cfg = config("model=llama2_debug", "train.global_batch_size=4")
    ranking = rank(cfg, 2, cluster(memory_gb=0.001))
    assert not ranking.fits
    assert advice(ranking, 2, "llama2_debug")[0].startswith("llama2_debug does not fit on 2 devices")
    assert any("weights, gradients and optimizer state alone" in one.why for one in ranking.refused)
