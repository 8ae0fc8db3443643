"""A machine on which no one has an account, and the command as it is typed."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
from support.fake_wandb import FakeWandb

from tpresearch.dashboard import main


@pytest.fixture(autouse=True)
def _stranger(stranger: None) -> None:
    pass


@pytest.fixture
def dashboard(server: FakeWandb, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`python -m tpresearch.dashboard WORDS` in this process, with a key, against a project that is there."""
    server.run("one").project = "tpresearch"

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["dashboard", *words])
        main()

    return run
