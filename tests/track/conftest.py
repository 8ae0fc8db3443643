"""A config, a run of a few steps, and a machine on which no one has an account."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from example_run import FACTS, STEPS, example_config
from fake_wandb import FakeWandb
from rich.console import Console

from tpresearch.config.compose import as_dict
from tpresearch.config.schema import Config
from tpresearch.track import Tracker
from tpresearch.track.wandb_run import SETTINGS


@pytest.fixture(autouse=True)
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No W&B account of whoever runs the tests is seen, and waits are short."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    home = tmp_path / "home"
    home.mkdir()
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(home))
    monkeypatch.setenv("NETRC", str(home / "netrc"))
    monkeypatch.setitem(SETTINGS, "init_timeout", 2)
    monkeypatch.setitem(SETTINGS, "finish_timeout", 2)
    yield
    import wandb

    wandb.teardown(exit_code=0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    with FakeWandb() as fake:
        for name, value in fake.env().items():
            monkeypatch.setenv(name, value)
        yield fake


@pytest.fixture
def cfg() -> Config:
    return example_config()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def track(cfg: Config, run_dir: Path) -> Callable[..., Tracker]:
    """Makes the tracker of a run of `STEPS` steps that prints to memory."""

    def make(**options: Any) -> Tracker:
        console = Console(file=io.StringIO(), width=120)
        return Tracker(
            cfg, as_dict(cfg), run_dir, FACTS, STEPS, console=console, plan="the plan\n", **options
        )

    return make
