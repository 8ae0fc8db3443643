"""A config and a run of a few steps, on a machine on which no one has an account."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.example_run import FACTS, STEPS, example_config

from tpresearch.config.schema import Config
from tpresearch.track.tracker import Tracker


@pytest.fixture(autouse=True)
def _stranger(stranger: None) -> None:
    pass


@pytest.fixture
def cfg() -> Config:
    return example_config()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def track(cfg: Config, run_dir: Path) -> Callable[..., Tracker]:
    """Makes the tracker of a run of `STEPS` steps that prints to memory."""

    def make(plan: str = "the plan\n", **options: Any) -> Tracker:
        console = Console(file=io.StringIO(), width=120)
        return Tracker(cfg, run_dir, FACTS, STEPS, console=console, plan=plan, **options)

    return make
