"""The script for a few minutes of a GPU, rehearsed on the CPU; and its table, from rows that a card would leave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gpu import report
from support.commands import ROOT
from support.processes import runs, wait_for

MEASURE = ROOT / "experiments" / "gpu" / "measure.py"


def test_it_runs_on_a_cpu_with_tiny_sizes(tmp_path: Path) -> None:
    command = [sys.executable, str(MEASURE), "--out", str(tmp_path), "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--only", "facts,calibrate,training-8b"], capture_output=True, text=True, env=os.environ
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["stage"]: row["status"] for row in rows if "status" in row} == dict.fromkeys(
        ("facts", "calibrate", "training-8b"), "done"
    ), done.stdout
    backends = [row for row in rows if row.get("op") == "attention backend"]
    assert {row["dtype"] for row in backends} == {"torch.bfloat16", "torch.float32", "torch.float64"}
    timed = [row for row in rows if row["stage"] == "calibrate" and "us" in row]
    assert {"matmul NT", "matmul NN", "matmul TN", "copy", "adamw bfloat16", "swiglu eager"} <= {
        r["op"] for r in timed
    }
    assert all(row["us"] > 0 for row in timed)
    trained = [row for row in rows if "step_s" in row]
    assert [row["id"] for row in trained] == ["8b none mb4", "8b none mb4 tuned"]
    for row in trained:
        assert len(row["losses"]) == 3
        assert row["losses"] == trained[0]["losses"] or row is not trained[0]
        assert row["overrides"]["weights"] == "bfloat16"
    for row in trained:
        of_id = [step["seconds"] for step in rows if step.get("event") == "step" and step["id"] == row["id"]]
        assert of_id[-2:] == row["steps_s"]
    profiled = [row for row in rows if row.get("event") == "profile"]
    assert profiled[0]["id"] == "8b none mb4"
    assert {"matmul", "pointwise"} <= profiled[0]["classes"].keys()


@pytest.mark.exhaustive
def test_a_setting_that_fails_leaves_the_next_their_turn(tmp_path: Path) -> None:
    program = (
        "import sys, training\n"
        "steps = training.steps\n"
        "def failing(loop, name, cfg, stage):\n"
        "    if name == '7b none mb4': raise ValueError('no luck')\n"
        "    return steps(loop, name, cfg, stage)\n"
        "training.steps = failing\n"
        "training.main()\n"
    )
    command = [sys.executable, "-c", program, "7b", "--out", str(tmp_path), "--device", "cpu", "--tiny"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(MEASURE.parent)])}
    subprocess.run([*command, "--limit", "60"], check=True, capture_output=True, env=env)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    (failed,) = [row for row in rows if "error" in row]
    assert (failed["id"], failed["error"], failed["said"]) == ("7b none mb4", "ValueError", "no luck")
    assert [row["id"] for row in rows if "step_s" in row] == ["7b selective mb4"]


def test_a_call_that_is_told_to_end_ends_its_stage(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib, measure\n"
        "sleeps = ['-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(600)']\n"
        "measure.STAGES['facts'] = (600, sleeps)\n"
        "sys.argv[1:] = ['--out', sys.argv[1], '--only', 'facts']\n"
        "measure.main()\n"
    )
    env = os.environ | {"PYTHONPATH": str(MEASURE.parent)}
    call = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=env)
    said = tmp_path / "facts.log"
    wait_for(lambda: said.exists() and said.read_text().endswith("\n"))
    call.terminate()
    assert call.wait() == 143
    assert not runs(int(said.read_text()))


def test_a_stage_that_hangs_is_ended_and_those_after_it_run(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); import measure\n"
        "out = pathlib.Path(sys.argv[2])\n"
        "for name, code in (('hangs', 'import time; time.sleep(600)'), ('fails', '1 / 0'), ('runs', 'print(7)')):\n"
        "    measure.run(name, ['-c', code], 2.0 if name == 'hangs' else 60.0, out)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(MEASURE.parent), str(tmp_path)], check=True, capture_output=True
    )
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["status"], row["last_line"]) for row in rows] == [
        ("hangs", "out of time", ""),
        ("fails", "exit 1", "ZeroDivisionError: division by zero"),
        ("runs", "done", "7"),
    ]


def test_the_table_has_predictions_beside_what_was_measured() -> None:
    rows = [
        {"stage": "facts", "card": "NVIDIA H200"},
        {
            "id": "8b full mb2",
            "perf/tokens_per_second": 10234.6,
            "perf/mfu": 0.5326,
            "peak_bytes": 70_400_000_000,
        },
        {"id": "8b selective mb8", "error": "out of memory"},
        {"op": "matmul sustained", "us": 1500.0, "flops": 2.0 * 8192**3},
    ]
    lines = report.table([rows]).splitlines()
    assert (
        "| 8b full mb2 | tokens per second, tok/s | 10,200 | 10,471 | 10,235 (53.3% MFU) | 9,700 | not run |"
        in lines[2]
    )
    assert any(line.startswith("| 8b full mb2 | peak memory, GB | 70.1 | - | 70.4 |") for line in lines)
    assert any(
        line.startswith("| 8b selective mb8 | peak memory, GB | 151 | - | out of memory |") for line in lines
    )
    assert any("| 720 | - | 733 |" in line for line in lines)


def test_the_readme_has_the_table_of_what_is_recorded() -> None:
    text = (MEASURE.parent / "README.md").read_text()
    recorded = [report.read(path) for path in sorted((MEASURE.parent / "results").glob("*.jsonl"))]
    assert report.table(recorded) in text
