"""`python -m tpresearch.simulate`: what it prints and writes, and what it refuses in one line."""

from __future__ import annotations

import json
import shutil
from itertools import chain
from pathlib import Path

import pytest
from support.commands import ROOT, Done, environment, execute_warm
from support.launches import Command

from tpresearch.compare.groups import check_comparable, comparisons_of, group_each_run, labels
from tpresearch.compare.panel_data import panel_data
from tpresearch.compare.runs import find_runs
from tpresearch.ledger.entries import MEMORY_KINDS, Expected, MemoryUse, StepLedger
from tpresearch.track.panels import SECTIONS
from tpresearch.verify.ranks import Ranks

pytestmark = pytest.mark.cli

SMALL = ("model=llama2_debug", "tokenizer.vocab_size=260", "data.seq_len=64", "train.dtype=bfloat16")


@pytest.fixture
def simulate(ranks: Ranks, tmp_path: Path) -> Command:
    def run(*words: str) -> Done:
        program = ["-m", "tpresearch.simulate", *words]
        return execute_warm(ranks, None, program, tmp_path, environment(tmp_path, PYTHONPATH=str(ROOT)))

    return run


def test_a_step_is_foretold(simulate: Command) -> None:
    other = "model.plans.tp.out.dst=replicate"
    done = simulate(*SMALL, "world_size=64", "mesh.tp=4", "train.global_batch_size=32", "trace=true", other)
    assert done.code == 0, done.err
    assert f"\n  {other} has no effect: parallel=fsdp_tp has the rules of model.plans.sp\n  /" in done.out
    assert (
        "PREDICTED, not measured: llama2_debug, parallel=fsdp_tp, dp_shard=16 x tp=4, on h100_dgx" in done.out
    )
    path = Path(next(line for line in done.out.splitlines() if line.endswith("/simulate.json")).strip())
    found = json.loads(path.read_text())
    low, high = found["step_time_range_s"]
    assert 0 < low < found["step_time_s"] < high <= 1.11 * found["step_time_s"]
    assert found["fits"] is True
    lines = done.out.split(f"\n\n  {other}")[0].splitlines()
    assert max(map(len, lines)) <= 120  # checks and sources are long sentences
    first = next(line for line in lines if line.startswith("  checked"))
    assert first.split("checked", 1)[1].strip() in found["checked"][0]
    assert f"and {len(found['checked']) - 3} more, in simulate.json" in done.out
    memory = found["memory_bytes"]
    assert memory["peak"] == sum(size for kind, size in memory.items() if kind != "peak")
    assert {entry["axis"] for entry in found["communication"]} == {"dp_shard", "tp"}
    assert all(entry["time_s"] > 0 for entry in found["communication"])
    assert {"value", "kind", "source"} == set(next(iter(found["assumptions"].values())))
    tokens = 32 * 64 / 64 / found["step_time_s"]
    assert found["tokens_per_second_per_device"] == pytest.approx(tokens)
    events = json.loads((path.parent / "trace.json").read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["ph"] == "M"} == {"device", "dp_shard", "tp"}
    compared_with_a_real_run(path.parent, memory["peak"] - memory["reserved"])
    memory["temporaries"] = memory.pop("other")
    read_as_that_of_a_real_run(path.parent, {kind: memory[kind] for kind in MEMORY_KINDS})


def read_as_that_of_a_real_run(folder: Path, held: dict[str, int]) -> None:
    """The memory of the step by kind, at the peak, where a real run has it: in the ledger and for the panel of a comparison."""
    memory = json.loads((folder / "ledger.json").read_text())["memory"]
    assert {use["kind"]: use["at_peak_bytes"] for use in memory["measured"]} == held
    assert memory["peak_bytes"] == sum(held.values())
    assert memory["expected"] == dict.fromkeys(MEMORY_KINDS)
    real = StepLedger([], [MemoryUse("parameters", 1, 1)], None, Expected(None, {})).as_json()["memory"]
    assert memory.keys() == real.keys()
    assert memory["measured"][0].keys() == real["measured"][0].keys()
    (panel,) = (panel for panel in chain(*SECTIONS.values()) if panel.name == "memory_by_kind")
    groups = group_each_run(find_runs([str(folder)]).runs)
    shown = panel_data(panel, groups, comparisons_of(groups)).points
    assert dict(zip(shown["part"], shown["value"], strict=True)) == held


def compared_with_a_real_run(folder: Path, allocated: int) -> None:
    """The prediction, marked as such, beside a run of the same config that has a loss, and beside no other."""
    real = folder.with_name("real")
    shutil.copytree(folder, real)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary.pop("predicted") is True
    assert summary["memory/peak_bytes"] == allocated
    (real / "summary.json").write_text(json.dumps(summary | {"device": "H100", "corpus_hash": "c0ffee"}))
    (row,) = map(json.loads, (real / "metrics.jsonl").read_text().splitlines())
    (real / "metrics.jsonl").write_text(json.dumps(row | {"train/loss": 5.0}) + "\n")
    runs = find_runs([str(folder), str(real)]).runs
    assert check_comparable(runs, anyway=False, any_seed=False) == []
    assert labels(runs) == ["h100_dgx (predicted)", "H100"]
    assert labels(runs[:1]) == ["llama2_debug/fsdp16-tp4 (predicted)"]
    (comparison,) = comparisons_of(group_each_run(runs))
    assert [run.folder for run in comparison.baseline.runs] == [real]


def test_a_number_of_a_users_file_is_not_said_to_come_from_its_base(
    simulate: Command, tmp_path: Path
) -> None:
    path = tmp_path / "conf" / "cluster" / "mine.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("defaults: [h100_dgx]\nname: mine\nnumbers:\n  inter_gb_s: {value: 25}\n")
    done = simulate(*SMALL, "cluster=mine", "hydra.run.dir=run", "--config-dir", "conf")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "run" / "simulate.json").read_text())
    source = "changed in cluster/mine.yaml, which states no source"
    assert found["assumptions"]["inter_gb_s"] == {"value": 25, "kind": "guessed", "source": source}
    assert all(line.startswith("before inter_gb_s changed, ") for line in found["checked"])


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (("gpus=16",), "error: gpus=16: an option of the planner; world_size=16; try: "),
        (("cluster=dgx",), "error: cluster=dgx: "),
        (
            ("checkpoint=every",),
            "error: checkpoint=every: simulate does not use this config group; it takes cluster, data, experiment, logger, ",
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused_in_one_line(
    simulate: Command, words: tuple[str, ...], refusal: str
) -> None:
    done = simulate(*SMALL, *words)
    assert done.code == 2
    assert done.refusal.startswith(refusal), done.err


def test_no_job_of_a_sweep_begins_if_the_plan_of_one_does_not_suit_the_model(
    simulate: Command, tmp_path: Path
) -> None:
    done = simulate("-m", *SMALL, "world_size=16", "parallel=fsdp_tp", "mesh.tp=2,8", "hydra.sweep.dir=sweep")
    assert done.code == 2
    assert done.refusal.startswith("error: mesh.tp=8: does not divide model.n_kv_heads=4"), done.err
    assert "in job 1 of the sweep" in done.refusal
    assert not (tmp_path / "sweep").exists()


def test_under_torchrun_it_proposes_the_same_without(ranks: Ranks, tmp_path: Path) -> None:
    program = ["-m", "tpresearch.simulate", *SMALL, "world_size=8"]
    done = execute_warm(ranks, 2, program, tmp_path, environment(tmp_path, PYTHONPATH=str(ROOT)))
    assert done.refusal.startswith("error: WORLD_SIZE=2: "), done.err
    assert done.command_to_try == ["python", *program]
