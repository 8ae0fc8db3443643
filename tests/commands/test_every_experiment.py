"""Every file of conf/experiment trains, narrowed to seconds, in a sweep."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest
from support.commands import environment, execute
from support.trainings import TRAIN

pytestmark = [pytest.mark.cli, pytest.mark.exhaustive]
LARGE = {"pretraining": ["model=llama2_debug", "data.seq_len=64", "train.global_batch_size=4"]}
"""What is narrowed besides."""
FILES = (TRAIN.parent / "conf" / "experiment").glob("*.yaml")
EXPERIMENTS = sorted(path.stem for path in FILES if path.stem not in LARGE)
NARROW = ["world_size=2", "train.steps=1", "train.eval_rows=4", "logger=none"]


@pytest.mark.parametrize(
    ("names", "narrow"), [(EXPERIMENTS, []), *(([name], words) for name, words in LARGE.items())]
)
def test_every_experiment_trains(names: list[str], narrow: list[str], home: Path, tmp_path: Path) -> None:
    typed = [
        f"experiment={','.join(names)}",
        *narrow,
        *NARROW,
        f"data.cache_dir={tmp_path}/cache",
        "hydra.sweep.dir=sweep",
    ]
    command = [sys.executable, str(TRAIN), "-m", *typed, "hydra.launcher.cpu_slots=2"]
    done = execute(command, tmp_path, environment(home))
    assert done.code == 0, done.out
    with (tmp_path / "sweep/summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["experiment"] for row in rows] == names
    assert {row["status"] for row in rows} == {"completed"}
    assert {row["steps"] for row in rows} == {"1"}
