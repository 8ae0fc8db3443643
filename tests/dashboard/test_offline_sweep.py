"""Runs that share a `wandb/` folder, as a sweep's do: in the terminal view, and synced in one go."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.arrivals import logged
from support.example_run import FACTS, STEPS, example_config, train
from support.fake_wandb import FakeWandb

from tpresearch.config.schema import DataPlan, ParallelConfig, TensorPlan
from tpresearch.ledger.entries import Entry, Expected, MemoryUse, StepLedger
from tpresearch.track.record import read_metrics, read_summary
from tpresearch.track.tracker import Tracker

pytestmark = pytest.mark.cli
WANDB = Path(sys.executable).parent / "wandb"
SENT = [Entry("tp", "forward", "dtensor", "all_reduce", 2, 1000, 1000)]
COUNT = StepLedger(SENT, [MemoryUse("gradients", 64, 64)], None, Expected(SENT, {}))


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two finished offline runs in `0` and `1`, and their one `wandb`."""
    plans = ParallelConfig("tp", TensorPlan.tp), ParallelConfig("fsdp", data=DataPlan.fsdp)
    for number, plan in enumerate(plans):
        cfg = dataclasses.replace(example_config(), parallel=plan)
        cfg.logger.group, cfg.logger.dir, cfg.logger.job_type = "study", str(tmp_path), "bench"
        tracker = Tracker(cfg, tmp_path / str(number), FACTS, STEPS)
        tracker.record_ledger(COUNT)
        train(tracker)
    return tmp_path


def wandb(*words: str | Path, **env: str) -> str:
    done = subprocess.run(
        [WANDB, *words], env=os.environ | env, check=True, capture_output=True, text=True, timeout=1500
    )
    return done.stdout


def test_one_sync_brings_each_run_whole(sweep: Path) -> None:
    folders = sorted((sweep / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    with FakeWandb() as server:
        where = {key: value for key, value in server.env().items() if key != "WANDB_MODE"}
        wandb("sync", *folders, **where)
        runs = {run.config["parallel"]["name"]: run for run in server.runs.values()}
    assert set(runs) == {"tp", "fsdp"}
    for number, plan in enumerate(("tp", "fsdp")):
        run, record = runs[plan], sweep / str(number)
        assert (run.project, run.group, run.job_type, run.exit_code) == ("tpresearch", "study", "bench", 0)
        assert sorted(run.tags) == sorted([plan, "llama2_tiny", "cpu", "float32"])
        assert logged(run) == read_metrics(record)
        defined = {key: value for key, value in read_summary(record).items() if value is not None}
        assert defined.items() <= run.summary.items()


def test_the_terminal_view_shows_each_run_by_the_names_that_panels_use(sweep: Path) -> None:
    names = set()
    for folder in (sweep / "wandb").glob("offline-run-*"):
        lines = wandb("leet", "inspect", "--summary", folder).splitlines()
        shown = dict(line.split(maxsplit=1) for line in lines if " " in line.strip())
        names.add(shown["run"].partition(" ")[0])
        assert shown["memory/held_bytes.gradients"] == "64"
        assert shown["comm/bytes_per_step_by_collective.tp/all_reduce"] == "1000"
    assert names == {"llama2_tiny/tp2", "llama2_tiny/fsdp2"}
