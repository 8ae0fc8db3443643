"""The main job, `torchrun --nproc-per-node=4 train.py parallel=fsdp_tp`, leaves what the contract says."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support import composed
from support.trainings import Start, Trained

from tpresearch.config.compose import as_dict
from tpresearch.launch.claim import RUN_FILES

pytestmark = pytest.mark.cli

FILES = {
    *(".hydra", "config.yaml", "plan.txt", "metrics.jsonl", "summary.json", "ledger.json", "train.log"),
    *("ranks", "wandb", "tokenizer", "checkpoints", ".lock"),
}
METRICS = {
    *("train/step", "train/tokens", "train/loss", "train/grad_norm", "train/lr", "val/loss"),
    *("perf/step_time_s", "perf/tokens_per_second", "perf/tokens_per_second_per_device", "perf/mfu"),
    *("time/data_s", "memory/peak_bytes", "comm/bytes_per_step"),
}
MESH = "DeviceMesh('cpu', [[0, 1], [2, 3]], mesh_dim_names=('dp_shard', 'tp'))"
PARAMETERS = 2 * 300 * 64 + 2 * (2 * 64 + 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192) + 64


def test_the_phases_of_a_step_make_up_its_time(run_2d: Trained) -> None:
    phases = ("data", "forward", "loss", "backward", "clip", "optimizer")
    for row in run_2d.rows:
        parts = [row[f"time/{phase}_s"] for phase in phases]
        assert all(part > 0 for part in parts)
        # What lies between them, the row itself included, is little.
        assert 0.6 * row["perf/step_time_s"] < sum(parts) <= row["perf/step_time_s"]


def test_the_run_folder_holds_every_file(run_2d: Trained) -> None:
    assert {path.name for path in run_2d.folder.iterdir()} == FILES
    assert FILES - {".lock"} <= {*RUN_FILES}, "all is set aside where another run gets the folder"
    assert {path.name for path in (run_2d.folder / ".hydra").iterdir()} == {
        "config.yaml",
        "hydra.yaml",
        "overrides.yaml",
    }
    assert sorted(path.name for path in (run_2d.folder / "ranks").iterdir()) == [
        f"rank-0000{rank}.log" for rank in range(4)
    ]
    assert list((run_2d.folder / "wandb").glob("offline-run-*/run-*.wandb"))


def test_a_row_a_step_with_every_metric(run_2d: Trained) -> None:
    assert run_2d.column("train/step") == [1, 2, 3]
    assert run_2d.column("train/tokens") == [128, 256, 384]
    assert run_2d.column("perf/mfu") == [None] * 3  # no peak is known of a CPU
    first, *_, last = run_2d.rows
    assert set(first) >= METRICS
    assert set(first) == set(last)
    assert {name for name in METRICS if last[name] is None} == {"perf/mfu"}
    assert all(last[name] > 0 for name in METRICS - {"perf/mfu"})
    assert 5 < last["train/loss"] < first["train/loss"] < 6  # from about log(300) = 5.70 downwards


def test_the_summary_tells_of_the_run(run_2d: Trained) -> None:
    summary = run_2d.json("summary.json")
    said = {
        "status": "completed",
        "steps": 3,
        "tokens": 384,
        "world_size": 4,
        "mesh": {"dp_shard": 2, "tp": 2},
        "model": "llama2_debug",
        "parallel": "fsdp_tp",
        "parameters": PARAMETERS,
        "held_out_rows": 8,
        "train/loss": run_2d.rows[-1]["train/loss"],
        "val/loss": run_2d.rows[-1]["val/loss"],
        "comm/bytes_per_step": run_2d.rows[-1]["comm/bytes_per_step"],
    }
    assert said.items() <= summary.items()
    assert "error" not in summary
    assert summary["corpus_hash"]
    assert summary["memory/peak_bytes"] == max(run_2d.column("memory/peak_bytes"))


def test_the_config_is_kept_resolved(run_2d: Trained, small: list[str]) -> None:
    config = yaml.safe_load((run_2d.folder / "config.yaml").read_text())
    assert (config["model"]["vocab_size"], config["model"]["max_seq_len"]) == (300, 16)
    qkv = {"match": "layers.*.attention.w[qkv]", "style": "colwise", "units": ["n_heads", "n_kv_heads"]}
    assert qkv.items() <= config["model"]["plans"]["sp"]["qkv"].items()
    assert config["train"]["steps"] == 3
    assert config == as_dict(composed.config(*small, "parallel=fsdp_tp", small=False))
    assert "${" not in (run_2d.folder / "config.yaml").read_text()
    assert "parallel=fsdp_tp" in yaml.safe_load((run_2d.folder / ".hydra/overrides.yaml").read_text())


def test_a_new_process_composes_what_warm_ones_do(train: Start, small: list[str], tmp_path: Path) -> None:
    """There Hydra finds out again what support/parsed_once.py keeps: every node, its own included, before any is resolved."""
    words = [*small, "experiment=seed_2d", "parallel=hsdp_tp", "optimizer=sgd", "train.steps=7", "--cfg=all"]
    warm, new = (train(None, tmp_path, *words, cold=cold) for cold in (False, True))
    assert (warm.code, warm.out) == (0, new.out)
    assert new.out.count("\n") > 400
    assert "${" in new.out


def test_the_ledger_sums_to_what_the_metrics_say(run_2d: Trained) -> None:
    ledger = run_2d.json("ledger.json")
    assert set(ledger) == {"measured", "expected", "memory"}
    keys = {"axis", "phase", "issuer", "collective", "count", "tensor_bytes", "sent_bytes"}
    assert all(set(entry) == keys for entry in ledger["measured"])
    assert sum(entry["sent_bytes"] for entry in ledger["measured"]) == run_2d.rows[-1]["comm/bytes_per_step"]
    assert {entry["axis"] for entry in ledger["measured"]} == {"dp_shard", "tp"}
    assert {entry["phase"] for entry in ledger["measured"]} <= {
        *("forward", "backward", "loss", "optimizer", "clip")
    }


def test_the_ledger_says_what_the_step_held(run_2d: Trained) -> None:
    memory = run_2d.json("ledger.json")["memory"]
    held = {kind["kind"]: kind for kind in memory["measured"]}
    assert list(held) == list(memory["expected"])
    for kind in ("parameters", "gradients", "optimizer"):
        assert held[kind]["most_bytes"] == memory["expected"][kind] > 0
    assert sum(kind["at_peak_bytes"] for kind in held.values()) == memory["peak_bytes"]
    assert memory["allocator_peak_bytes"] is None  # the CPU's allocator keeps no such count
    summary = run_2d.json("summary.json")
    assert summary["memory/held_bytes"] == {name: kind["most_bytes"] for name, kind in held.items()}
    by_axis = summary["comm/bytes_per_step_by_axis"]
    assert set(by_axis) == {"dp_shard", "tp"}
    assert sum(by_axis.values()) == summary["comm/bytes_per_step"]


def test_the_mesh_and_the_model_are_said_once_over_all_ranks(run_2d: Trained) -> None:
    for said in (run_2d.done.out + run_2d.done.err, (run_2d.folder / "train.log").read_text()):
        assert said.count(MESH) == 1
        assert said.count("DeviceMesh(") == 1
        assert said.count(f"({PARAMETERS:,} parameters)") == 1
        assert said.count("model=Llama2\n") == 1
        assert said.count("layers.{0-1}.attention.wq.weight") == 1  # two equal layers folded into one line


def test_the_plan_is_kept_as_plan_only_prints_it(run_2d: Trained, train_py: Start, small: list[str]) -> None:
    printed = train_py(*small, "parallel=fsdp_tp", "plan_only=true", "world_size=4").out
    assert (run_2d.folder / "plan.txt").read_text().strip() in printed


def test_the_report_ends_with_where_it_lies(run_2d: Trained) -> None:
    report = run_2d.done.out
    where = f"outputs/train/{run_2d.folder.parent.name}/{run_2d.folder.name}"
    assert "llama2_debug/fsdp2-tp2: completed" in report
    assert f"run    {where}\n" in report
    assert f"wandb sync {where}/wandb/offline-run-" in report
