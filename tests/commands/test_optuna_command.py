"""A Hydra sweeper that learns from each job: Optuna's, told a figure of summary.json."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from support.trainings import Start

pytestmark = pytest.mark.cli


def test_optuna_is_told_the_objective_of_each_trial(train: Start, small: list[str], tmp_path: Path) -> None:
    typed = [word for word in small if not word.startswith(("model=", "train.steps="))]
    typed += ["model=toy_mlp", "train.steps=2", "logger=none", "parallel=none", "hydra.sweep.dir=sweep"]
    typed += ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"]
    typed += ["hydra.sweeper.sampler.seed=1", "hydra.launcher.objective=val/loss"]
    searched = "optimizer.lr=tag(log, interval(1e-4, 1e-1))"
    done = train(None, tmp_path, "-m", *typed, searched)
    assert done.code == 0, done.out + done.err
    trials = [json.loads((tmp_path / f"sweep/{n}/summary.json").read_text()) for n in range(2)]
    losses = [trial["val/loss"] for trial in trials]
    assert losses[0] != losses[1]
    best = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    assert best["best_value"] == min(losses)
    config = yaml.safe_load((tmp_path / f"sweep/{losses.index(min(losses))}/config.yaml").read_text())
    assert best["best_params"] == {"optimizer.lr": config["optimizer"]["lr"]}


def test_optuna_does_not_search_for_the_slowest_job(train: Start, tmp_path: Path) -> None:
    typed = [
        "-m",
        "parallel=none",
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=2",
        "hydra.sweeper.n_jobs=1",
    ]
    typed += ["optimizer.lr=choice(0.1,0.2)", "hydra.launcher.objective=perf/tokens_per_second_per_device"]
    done = train(None, tmp_path, *typed, "hydra.sweep.dir=sweep")
    assert done.code == 2, done.out + done.err
    assert done.refusal.startswith(
        "error: hydra.sweeper.direction=minimize: the best job would be that of least perf/"
    )
    assert "hydra.sweeper.direction=maximize" in done.command_to_try
    assert not (tmp_path / "sweep/0").exists()
