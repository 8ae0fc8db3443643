"""A study is one file of the group `experiment`: here from a folder of the user's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.trainings import Start, Trained

pytestmark = pytest.mark.cli

STUDY = """# @package _global_
# How few heads will do.
defaults:
  - override /parallel: tp
  - override /logger: none
  - override /optimizer: sgd
name: heads
train: {steps: 2}
model: {n_kv_heads: 2}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    (tmp_path / "mine" / "experiment" / "heads.yaml").write_text(STUDY)
    return tmp_path / "mine"


def test_an_experiment_chooses_options_and_sets_values(
    train_py: Start, small: list[str], folder: Path, tmp_path: Path
) -> None:
    unset = [word for word in small if not word.startswith("train.steps")]
    words = ("experiment=heads", *unset, "world_size=1", "hydra.run.dir=run")
    done = train_py(*words, f"hydra.searchpath=[file://{folder}]")
    assert done.code == 0, done.err
    run = Trained(done, tmp_path / "cwd" / "run")
    assert run.column("train/step") == [1, 2]
    config = yaml.safe_load((run.folder / "config.yaml").read_text())
    assert (config["name"], config["parallel"]["name"], config["model"]["n_kv_heads"]) == ("heads", "tp", 2)
    assert config["optimizer"]["name"] == "sgd"
    assert not (run.folder / "wandb").exists()


def test_what_is_typed_goes_before_the_experiment(train_py: Start, small: list[str], folder: Path) -> None:
    typed = ("experiment=heads", "plan_only=true", "parallel=sp", "mesh.tp=2", "--config-dir", str(folder))
    done = train_py(*small, *typed)
    assert done.out.startswith("model=llama2_debug parallel=sp world_size=2: {'tp': 2}\n"), done.err
    (wk,) = [line for line in done.out.splitlines() if ".attention.wk.weight" in line]
    assert "  8x64" in wk  # one of two KV heads of 8


def test_overrides_after_a_flag_are_refused_with_the_order_that_works(
    train_py: Start, small: list[str], folder: Path
) -> None:
    done = train_py("experiment=heads", "--config-dir", str(folder), "plan_only=true", "mesh.tp=2")
    assert done.refusal.startswith("error: flags=plan_only=true mesh.tp=2: not understood; key=value overr")
    tried = train_py(*done.command_to_try[2:])
    assert tried.code == 0, tried.err
    assert tried.out.startswith("model=llama2_tiny parallel=tp world_size=2: {'tp': 2}\n")
