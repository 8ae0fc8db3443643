"""Our step beside the tutorial's script: the same losses, counted and timed in turns. The other peers have an environment
of their own, and are left out where they are not installed.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from support.commands import ROOT, environment, execute_warm
from support.marks import exhaustive

from tpresearch.verify.ranks import Ranks

pytestmark = pytest.mark.cli
TURNS = str(ROOT / "experiments" / "peers" / "turns.py")
JOB = (
    "model=llama2_debug",
    "data=random_tokens",
    "data.seq_len=16",
    "train.global_batch_size=8",
    "train.steps=7",
)
SAME = (
    "schedule=constant",
    "schedule.warmup_steps=0",
    "optimizer.weight_decay=0",
    "train.clip_grad_norm=0.2",
)


@pytest.mark.parametrize("plan", ["fsdp_tp", exhaustive("sp"), exhaustive("fsdp")])
def test_ours_and_the_tutorials_script_do_the_same(ranks: Ranks, tmp_path: Path, plan: str) -> None:
    words = [TURNS, f"parallel={plan}", *JOB, *SAME, "logger=none"]
    done = execute_warm(ranks, 4, words, tmp_path, environment(tmp_path))
    assert done.code == 0, done.err
    with (tmp_path / "outputs" / "experiments" / "peers" / "results.csv").open() as file:
        ours, tutorial = csv.DictReader(file)
    assert (ours["contender"], tutorial["contender"]) == ("ours", "tutorial")
    assert "fabric is left out" in done.err
    assert float(tutorial["first_steps_differ_by"]) <= 1e-5
    assert float(tutorial["all_steps_differ_by"]) <= 1e-4
    assert float(tutorial["wall_ratio"]) > 0
    assert 0 < float(ours["peak_mib"]) < float(tutorial["peak_mib"])  # which gathers the logits
    assert int(ours["lines"]) < int(tutorial["lines"])
