"""`debug=fast` and `debug=overfit`, of any config, with no account."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from support.commands import ROOT, environment, execute
from support.trainings import TRAIN, Start, Trained

pytestmark = pytest.mark.cli

LINUX_ALONE = (
    "sched_getaffinity sched_setaffinity waitid pidfd_open memfd_create posix_fadvise copy_file_range"
)
"""Calls of `os` that macOS lacks (of Python 3.11)."""


def debugged(train: Start, tmp_path: Path, small: list[str], *words: str) -> Trained:
    kept = [word for word in small if not word.startswith("train.")]
    done = train(2, tmp_path, *kept, "train.global_batch_size=8", "parallel=fsdp", *words)
    assert done.code == 0, done.err
    (folder,) = tmp_path.glob("outputs/debug/*/*")
    return Trained(done, folder)


def test_fast_does_two_steps_of_everything(train: Start, small: list[str], tmp_path: Path) -> None:
    run = debugged(train, tmp_path, small, "debug=fast")
    assert run.column("train/step") == [1, 2]
    assert None not in run.column("val/loss")
    assert not (run.folder / "wandb").exists()
    assert run.json("summary.json")["perf/step_time_s"] > 0


def test_overfit_learns_one_batch_of_what_cannot_be_learned(train: Start, tmp_path: Path) -> None:
    words = ("data=random_tokens", "tokenizer.vocab_size=300", "data.seq_len=16", "debug=overfit")
    run = debugged(train, tmp_path, [], "model=llama2_debug", *words, "optimizer.lr=1e-2")
    first, last = run.column("train/loss")[0], run.column("train/loss")[-1]
    assert first > 5.5  # ln 300 = 5.7, the least that drawn tokens leave to learn
    assert last < 0.5


def test_every_part_runs_where_there_is_nothing_that_linux_alone_has(
    small: list[str], home: Path, tmp_path: Path
) -> None:
    removed = f"import os\nfor name in {LINUX_ALONE.split()}:\n    vars(os).pop(name, None)\n"
    (tmp_path / "sitecustomize.py").write_text(removed)
    env = environment(home, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    kept = [word for word in small if not word.startswith("train.")]
    words = ("debug=fast", "parallel=none", "train.global_batch_size=8", f"hydra.run.dir={tmp_path / 'run'}")
    done = execute([sys.executable, str(TRAIN), *kept, *words], tmp_path, env)
    assert done.code == 0, done.err
