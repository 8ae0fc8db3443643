"""The script for a few minutes of a GPU, rehearsed on the CPU; and its table, from rows that a card would leave."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from gpu import foresee, measure, report, training
from held_to_gpu import measure as held_to_gpu
from support.commands import ROOT
from support.processes import runs, wait_for

MEASURE = ROOT / "experiments" / "gpu" / "measure.py"


def test_it_runs_on_a_cpu_with_tiny_sizes(tmp_path: Path) -> None:
    command = [sys.executable, str(MEASURE), "--out", str(tmp_path), "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--only", "facts,calibrate,calibrate-command,training-8b"],
        capture_output=True,
        text=True,
        env=os.environ,
    )
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "results.jsonl").read_text()
    assert "OUT/measured.yaml" in text
    assert str(tmp_path) not in text  # recorded results hold no paths of a machine
    called, *rows = [json.loads(line) for line in text.splitlines()]
    assert called["command"].startswith("python experiments/gpu/measure.py --out OUT --device cpu")
    # A day without one would come before all others.
    assert report.dated([called, *rows])[-1]["date"] == f"{date.today()}"
    assert {row["stage"]: row["status"] for row in rows if "status" in row} == dict.fromkeys(
        ("facts", "calibrate", "calibrate-command", "training-8b"), "done"
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
    (profiled,) = [row for row in rows if row.get("event") == "profile"]
    assert profiled["id"] == "8b none mb4"
    assert {"matmul", "pointwise"} <= profiled["classes"].keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs.txt", "measured.yaml", "results.jsonl"]
    assert "and simulate with cluster=measured" in (tmp_path / "logs.txt").read_text()


def test_all_tests_that_need_a_card_are_among_its_stages() -> None:
    marked = re.compile(r"\b(on_card\(|pytest\.mark\.gpu\b)")
    tests = (path for path in (ROOT / "tests").glob("*/test_*.py") if marked.search(path.read_text()))
    _, command = measure.STAGES["correctness"]
    assert sorted(map(str, tests)) == sorted(word for word in command if word.startswith(str(ROOT / "tests")))


def test_the_cards_of_the_readme_are_compared_with_predictions_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[str]()

    def no_steps(path: Path) -> list[dict[str, str]]:
        read.append(path.name)
        return [{"card": "NVIDIA H200", "step_s": ""}]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["measure.py"])
    for name, pretended in (("read_rows", no_steps), ("held", lambda *_: {"file": "one"}), ("text", str)):
        monkeypatch.setattr(held_to_gpu, name, pretended)
    held_to_gpu.main()
    assert read == [f"h200-2026-11-26-{card}.jsonl" for card in ("first", "second", "third")]
    assert (tmp_path / "outputs/experiments/held_to_gpu/results.csv").read_text() == "file\n" + "one\n" * 3


@pytest.mark.exhaustive
def test_a_setting_that_fails_leaves_the_next_their_turn(tmp_path: Path) -> None:
    program = (
        "from gpu import training\n"
        "steps = training.steps\n"
        "def failing(loop, name, cfg, stage):\n"
        "    if name == '7b none mb4': raise ValueError('no luck')\n"
        "    return steps(loop, name, cfg, stage)\n"
        "training.steps = failing\n"
        "training.main()\n"
    )
    command = [sys.executable, "-c", program, "7b", "--out", str(tmp_path), "--device", "cpu", "--tiny"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(MEASURE.parents[1])])}
    subprocess.run([*command, "--limit", "60"], check=True, capture_output=True, env=env)
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    (failed,) = [row for row in rows if "error" in row]
    assert (failed["id"], failed["error"], failed["said"]) == ("7b none mb4", "ValueError", "no luck")
    assert [row["id"] for row in rows if "step_s" in row] == ["7b selective mb4"]


def test_a_call_that_is_told_to_end_ends_its_stage(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from gpu import measure\n"
        "sleeps = ['-c', 'import os, time; print(os.getpid(), flush=True); time.sleep(600)']\n"
        "measure.STAGES['facts'] = (600, sleeps)\n"
        "sys.argv[1:] = ['--out', sys.argv[1], '--only', 'facts']\n"
        "measure.main()\n"
    )
    env = os.environ | {"PYTHONPATH": str(MEASURE.parents[1])}
    call = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=env)
    said = tmp_path / "logs.txt"
    wait_for(lambda: said.exists() and said.read_text().count("\n") == 2)
    call.terminate()
    assert call.wait() == 143
    assert not runs(int(said.read_text().splitlines()[-1]))


def test_a_stage_that_hangs_is_ended_and_those_after_it_run(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[1]); from gpu import measure\n"
        "out = pathlib.Path(sys.argv[2])\n"
        "for name, code in (('hangs', 'import time; time.sleep(600)'), ('fails', '1 / 0'), ('runs', 'print(7)')):\n"
        "    measure.run(name, ['-c', code], 2.0 if name == 'hangs' else 60.0, out)\n"
    )
    subprocess.run(
        [sys.executable, "-c", program, str(MEASURE.parents[1]), str(tmp_path)],
        check=True,
        capture_output=True,
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
        {"id": "8b full mb2", "perf/tokens_per_second": 10234.6, "perf/mfu": 0.5326, "peak_bytes": 70.4e9},
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
    assert report.simulated_table(recorded, report.read_simulated()) in text


def predicted(id: str, cluster: str, step_s: float, memory_gb: float, reason: str = "") -> dict[str, str]:
    return {
        "id": id,
        "cluster": cluster,
        "step_s": f"{step_s:.4f}",
        "low": f"{step_s * 0.9:.4f}",
        "high": f"{step_s * 1.1:.4f}",
        "tokens_per_s": f"{32768 / step_s:.0f}",
        "memory_bytes": str(int(memory_gb * 1e9)),
        "reason": reason,
        "date": "2026-11-27",
    }


def measured(id: str, step_s: float, peak_gb: float) -> dict[str, object]:
    return {"id": id, "step_s": step_s, "perf/tokens_per_second": 32768 / step_s, "peak_bytes": peak_gb * 1e9}


def test_the_simulator_s_table_has_errors_and_which_rows_were_blind() -> None:
    h200 = {"stage": "facts", "card": "NVIDIA H200"}
    before = [{"command": "", "date": "2026-11-26"}, h200, measured("8b full mb2", 2.5, 100)]
    after = [
        {"command": "", "date": "2026-11-27"},
        h200,
        {"id": "8b full mb2", "event": "step", "seconds": 9.0},
        measured("8b full mb2", 2.0, 100),
        measured("8b full mb4", 3.2, 99),
        measured("7b none mb4", 2.0, 80),
        {"id": "8b selective mb8", "error": "out of memory"},
    ]
    predictions = [
        predicted("8b full mb2", "h200_dgx", 2.1, 101),
        predicted("8b full mb2", "h100_dgx", 2.2, 101, "104.0 of 85 GB: does not fit"),
        predicted("8b full mb4", "h200_dgx", 3.0, 99),
        predicted("7b none mb4", "h200_dgx", 2.5, 60),
        predicted("8b selective mb8", "h200_dgx", 3.0, 152, "155.0 of 150 GB: does not fit"),
        predicted("8b full mb4", "h200_calibrated", 3.2, 99),
        predicted("8b selective mb8", "h200_calibrated", 1.0, 1, "no such op") | {"step_s": ""},
    ]
    assert report.simulated_table([before, after], predictions).splitlines()[2:] == [
        "| 8b full mb2 | h200_dgx | 2.100 (1.89 to 2.31) | 2.000 | +5.0% | 15,604 | 16,384 | 101.0 | 100.0 | +1.0% | yes |",
        "| 8b full mb4 | h200_dgx | 3.000 (2.70 to 3.30) | 3.200 | -6.2% | 10,923 | 10,240 | 99.0 | 99.0 | +0.0% |  |",
        "| 7b none mb4 | h200_dgx | 2.500 (2.25 to 2.75) | 2.000 | +25.0% | 13,107 | 16,384 | 60.0 | 80.0 | -25.0% |  |",
        "| 8b selective mb8 | h200_dgx | 3.000 (2.70 to 3.30) | out of memory | - | 10,923 | - | 152.0 (does not fit) | - | - |  |",
        "| 8b full mb4 | h200_calibrated | 3.200 (2.88 to 3.52) | 3.200 | +0.0% | 10,240 | 10,240 | 99.0 | 99.0 | +0.0% |  |",
        "| 8b selective mb8 | h200_calibrated | no such op | out of memory | - | - | - | - | - | - |  |",
        "",
        "Blind: step time of 2 rows: mean error 15.6%, max +25.0%, bias +9.4%; 1 of 2 within the stated range.",
        "",
        "Calibrated: step time of 1 rows: mean error 0.0%, max +0.0%, bias +0.0%; 1 of 1 within the stated range.",
    ]


def test_a_step_is_foreseen_per_cluster_or_refused_in_one_line() -> None:
    words = (*training.TINY, "train.micro_batch_size=4", "parallel.compile=false")
    rows = list(foresee.foresee("tiny", words, foresee.CLUSTERS))
    assert [(row["id"], row["cluster"], row["reason"]) for row in rows] == [
        ("tiny", cluster, "") for cluster in foresee.CLUSTERS
    ]
    for row in rows:
        low, step, high = (float(row[key]) for key in ("low", "step_s", "high"))
        assert low < step < high
        # step_s has four decimals.
        assert float(row["tokens_per_s"]) == pytest.approx(8 * 16 / step, rel=0.05)
    assert rows[0]["memory_bytes"] == rows[1]["memory_bytes"]
    large = ("model.dim=8192", "model.ffn_dim=28672", "model.n_layers=80")
    (row,) = foresee.foresee("70b", (*training.LLAMA2_7B, *large), ["h100_dgx"])
    assert row["reason"].split(":")[1].startswith(" does not fit")
    (row,) = foresee.foresee("refused", (*words, "parallel.fsdp.cpu_offload=true"), ["h100_dgx"])
    assert row["reason"] == (
        "parallel.fsdp.cpu_offload=true: transfers to the host's memory are not simulated; false"
    )
    assert "step_s" not in row


def test_every_setting_is_foreseen_as_it_is() -> None:
    words = {
        name: " ".join((*overrides, *of_setting))
        for overrides, settings in training.FAMILIES.values()
        for name, of_setting in settings.items()
    }
    rows = {(row["id"], row["cluster"]): row["overrides"] for row in report.read_simulated()}
    wanted = {(name, cluster): words[name] for name in words for cluster in foresee.CLUSTERS}
    assert {key: rows.get(key) for key in wanted} == wanted
