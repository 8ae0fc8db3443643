"""Both loops of experiments/overhead: they compute the same, and the one written by hand takes the step that start-up is compared with."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
from overhead.first_step import by_hand
from overhead.startup import job_by_hand
from support.commands import ROOT, environment, execute_warm

from tpresearch.config.world import World
from tpresearch.verify.ranks import Ranks

OVERHEAD = ROOT / "experiments" / "overhead"
JOB = ("model=llama2_debug", "data=random_tokens", "data.seq_len=16", "train.global_batch_size=8")


@pytest.mark.exhaustive
@pytest.mark.cli
@pytest.mark.parametrize("plan", ["fsdp_tp", "ddp", "hsdp", "tp"])
def test_ours_and_the_loop_by_hand_reach_the_same_loss(ranks: Ranks, tmp_path: Path, plan: str) -> None:
    words = [str(OVERHEAD / "measure.py"), f"parallel={plan}", *JOB, "logger=none"]
    done = execute_warm(ranks, 4, words, tmp_path, environment(tmp_path))
    assert done.code == 0, done.err
    with (tmp_path / "outputs" / "experiments" / "overhead" / "results.csv").open() as file:
        (row,) = csv.DictReader(file)
    assert float(row["loss_ours"]) == pytest.approx(float(row["loss_bare"]), rel=1e-4)
    assert float(row["cpu_ratio"]) > 0


def test_the_job_by_hand_takes_its_first_step(ranks: Ranks) -> None:
    job = json.loads(job_by_hand([*JOB, "parallel=fsdp_tp"]))
    sizes = {name: job[name] for name in ("plan", "replicas", "shards", "tp", "rows", "seq_len")}
    assert list(sizes.values()) == ["fsdp_tp", 1, 2, 2, 8, 16]
    of_small_weights = math.log(job["model"]["vocab_size"])
    assert ranks.run(4, first_loss, job) == pytest.approx([of_small_weights] * 4, rel=0.02)


def first_loss(world: World, job: dict[str, Any]) -> float:
    return by_hand(**job)
