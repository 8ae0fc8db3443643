"""`python train.py -m ...`: a torchrun a job, a failure that stays its own, a table, and the rest on the next start."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from support.commands import Done, environment, execute_warm
from support.launches import PROGRAM
from support.trainings import Start, Trained

from tpresearch.verify.ranks import Ranks

pytestmark = pytest.mark.cli


def test_a_sweep_that_is_refused_leaves_nothing(train: Start, tmp_path: Path) -> None:
    done = train(None, tmp_path, "-m", "parallel=tp,tpp", "hydra.sweep.dir=sweep")
    assert done.code == 2
    assert done.refusal.startswith("error: parallel=tp,tpp: there is no tpp; ")
    assert list(tmp_path.iterdir()) == []


def test_a_key_of_swept_models_need_not_be_one_of_the_default_model(train: Start, tmp_path: Path) -> None:
    typed = ["model=toy_mlp,toy_net", "model.hidden_dim=32", "data.path=nowhere"]
    done = train(None, tmp_path, "-m", *typed, "hydra.sweep.dir=sweep")
    assert done.code == 2
    refused = "error: data.path=nowhere: data=pystdlib reads no path, in job 0 of the sweep (model=toy_mlp "
    assert done.refusal.startswith(f"{refused}model.hidden_dim=32 ")


def test_a_job_is_a_new_process(ranks: Ranks, tmp_path: Path) -> None:
    """In other tests, jobs that come to their end are forks of a warm one."""
    typed = [str(PROGRAM), "-m", "name=a", "parallel=none", "hydra.sweep.dir=sweep"]
    done = execute_warm(ranks, None, typed, tmp_path, environment(tmp_path), cold_jobs=True)
    assert done.code == 0, done.err
    assert "job 0 completed after " in done.out
    said = (tmp_path / "sweep/0/console.log").read_text()
    assert f"folder {tmp_path}/sweep/0 .hydra rank 0 of 1 ['name=a', 'parallel=none'," in said


# With so great a learning rate the second step's loss is not a number, which stops the run.
STUDIES = {"wrong": ("none", "1e30"), "right": ("fsdp_tp", "1e-3")}
STUDY = "# @package _global_\ndefaults:\n  - override /parallel: {}\noptimizer: {{lr: {}}}\n"


def test_a_sweep_runs_what_it_can_and_then_what_is_left(
    train: Start, small: list[str], tmp_path: Path
) -> None:
    for name, values in STUDIES.items():
        (tmp_path / "mine" / "experiment").mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / "experiment" / f"{name}.yaml").write_text(STUDY.format(*values))
    typed = [word for word in small if not word.startswith(("model=", "train.steps="))]
    typed += ["experiment=wrong,right", f"hydra.searchpath=[file://{tmp_path}/mine]", "world_size=2"]
    typed += ["optimizer=sgd", "model=toy_mlp", "schedule.warmup_steps=0", "train.clip_grad_norm=null"]
    typed += ["train.steps=2", "logger=none"]

    def start() -> Done:
        return train(None, tmp_path, "-m", *typed, "hydra.sweep.dir=sweep")

    done = start()
    assert done.code == 1, done.err
    error = "NonfiniteError: train/loss is nan at step 2"
    error += "; a lower optimizer.lr, or train.on_nonfinite=skip to leave out such updates"
    assert done.out.count("  parallel=fsdp_tp on 2 ranks runs without dp_shard (size 1); with 4 ranks ") == 1
    assert f"job 0 failed: {error}\n  sweep/0/console.log" in done.out
    assert "Traceback" not in done.out + done.err
    with (tmp_path / "sweep/summary.csv").open() as file:
        failed, completed = csv.DictReader(file)
    assert (failed["status"], failed["error"], failed["experiment"]) == ("failed", error, "wrong")
    assert (completed["status"], completed["world_size"], completed["mesh/tp"]) == ("completed", "2", "2")
    run = Trained(done, tmp_path / "sweep/1")
    assert completed["train/loss"] == str(run.json("summary.json")["train/loss"])
    kept = {path.name for path in run.folder.iterdir()}
    assert {".hydra", "config.yaml", "plan.txt", "ledger.json"} <= kept
    assert error in (tmp_path / "sweep/summary.md").read_text()
    assert "\nagain      python " in done.out
    assert " optimizer=sgd " in done.out.partition("\nagain ")[2]
    before = (run.folder / "summary.json").stat().st_mtime_ns

    again = start()
    assert again.code == 1
    assert "job 0 starts on 1 rank" in again.out
    assert "job 1 was completed earlier: sweep/1" in again.out
    assert (run.folder / "summary.json").stat().st_mtime_ns == before
