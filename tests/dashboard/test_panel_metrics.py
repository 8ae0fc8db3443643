"""Every metric that the dashboard shows is one that trainings write: history for curves, summaries for the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import pytest
from support.composed import config
from support.fake_wandb import FakeRun, FakeWandb
from support.saved_views import flat, metrics_of, sections_of

from tpresearch.compare.workspace import workspace
from tpresearch.config import Config
from tpresearch.launch import Run, World
from tpresearch.track import panels
from tpresearch.track.panels import SECTIONS, Panel
from tpresearch.train.main import train
from tpresearch.train.preflight import preflight
from tpresearch.verify.ranks import Ranks

TINY = (
    "model=llama2_debug",
    "tokenizer.vocab_size=300",
    "train.steps=2",
    "train.warmup_log_steps=1",
    "device=cpu",
)
TRACKED = ("train.log_every=1", "train.eval_every=2", "train.eval_rows=8", "logger.wandb=true")
ON_A_GPU = {"perf/mfu"}
"""Undefined on a CPU, and what is undefined is not in W&B's summary."""


def train_online(world: World, cfg: Config, folder: Path, env: dict[str, str]) -> None:
    """A whole training of a rank, as `train.py` has it; rank 0 tells W&B."""
    with patch.dict(os.environ, env):
        train(preflight(cfg, world), Run(folder, world))


@pytest.fixture(scope="module")
def runs(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[FakeRun]]:
    """Two runs that between them have every axis and collective of our plans."""
    folder = tmp_path_factory.mktemp("runs")
    for index in range(60):
        (folder / f"{index}.txt").write_text(" ".join(f"word{index * i % 97}" for i in range(120)))
    data = ("data=text", f"data.path={folder}/*.txt", f"data.cache_dir={folder}/cache")
    with FakeWandb() as server:
        env = server.env() | {"HOME": str(folder)}
        for plan, size in (("hsdp", 4), ("sp", 2)):
            (folder / plan).mkdir()
            cfg = config(f"parallel={plan}", *data, *TINY, *TRACKED)
            ranks.run(size, train_online, cfg, folder / plan, env)
        yield list(server.runs.values())


def unwritten(runs: list[FakeRun]) -> set[str]:
    """What the dashboard's panels name and none of the runs has a value of."""
    rows = [row for run in runs for row in run.history]
    history = {key for row in rows for key, value in row.items() if value is not None}
    summary = {key for run in runs for key, value in flat(run.summary).items() if value is not None}
    spec = workspace("study", "study", "tpresearch", "fake")._spec["spec"]
    missing: set[str] = set()
    for panel in (panel for section in sections_of(spec).values() for panel in section):
        of_history, of_summary = metrics_of(panel)
        missing |= (of_history - history) | (of_summary - summary)
    return missing


def test_each_metric_of_a_panel_is_written(runs: list[FakeRun]) -> None:
    assert len(runs) == 2
    assert unwritten(runs) == ON_A_GPU
    assert all("perf/mfu" in row for run in runs for row in run.history)


def test_a_metric_that_no_run_writes_is_found(runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = (
        Panel("perplexity", "Perplexity", "curve", ("train/perplexity",), ""),
        Panel("joules", "Energy", "bars", ("perf/joules_per_step",), ""),
    )
    monkeypatch.setitem(panels.SECTIONS, "Speed", (*SECTIONS["Speed"], *wrong))
    assert unwritten(runs) - ON_A_GPU == {"train/perplexity", "perf/joules_per_step"}
