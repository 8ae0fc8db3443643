"""Every file of conf/experiment trains, narrowed to seconds: one sweep over a glob."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
from support.commands import environment, execute
from support.trainings import TRAIN

pytestmark = [pytest.mark.cli, pytest.mark.exhaustive]
EXPERIMENTS = sorted(path.stem for path in (TRAIN.parent / "conf" / "experiment").glob("*.yaml"))
NARROW = ["world_size=2", "train.steps=1", "train.eval_rows=4", "logger=none"]


def test_every_experiment_trains(home: Path, tmp_path: Path) -> None:
    typed = ["experiment=glob(*)", *NARROW, f"data.cache_dir={tmp_path}/cache", "hydra.sweep.dir=sweep"]
    command = [sys.executable, str(TRAIN), "-m", *typed, "hydra.launcher.cpu_slots=2"]
    done = execute(command, tmp_path, environment(home))
    assert done.code == 0, done.out
    with (tmp_path / "sweep/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["experiment"] for row in rows] == EXPERIMENTS
    assert {row["status"] for row in rows} == {"completed"}
    assert {row["steps"] for row in rows} == {"1"}
