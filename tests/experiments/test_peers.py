"""Our step beside the tutorial's script: the same losses, counted and timed in turns. The other peers have an environment
of their own, and are left out where they are not installed.
"""

from __future__ import annotations

import csv
import json
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


def test_on_one_gpu_they_take_turns_and_an_error_ends_one_contender(ranks: Ranks, tmp_path: Path) -> None:
    """The rehearsal, on a CPU, where neither Fabric nor transformers is installed."""
    one_gpu = str(ROOT / "experiments" / "peers" / "one_gpu.py")
    words = [one_gpu, "--out", str(tmp_path), "--device", "cpu", "--tiny", "--limit", "60"]
    done = execute_warm(ranks, None, words, tmp_path, environment(tmp_path))
    assert done.code == 0, done.err
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    errors = {row["contender"]: row["error"] for row in rows if "error" in row}
    assert errors == dict.fromkeys(("fabric", "transformers"), "ModuleNotFoundError")
    ours, plain, wide = [row for row in rows if "turns" in row]
    assert (ours["contender"], plain["contender"], ours["turns"], plain["turns"]) == ("ours", "plain", 1, 1)
    assert len(ours["losses"]) == len(plain["losses"]) == 5
    assert wide["losses"] == ours["losses"]  # one chunk either way
    assert plain["same_work"]
    assert plain["losses_differ_by"] < 1e-3
