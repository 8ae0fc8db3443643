"""What has reached W&B, and what was said on the way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.fake_wandb import FakeRun, FakeWandb


def only_run(server: FakeWandb) -> FakeRun:
    (run,) = server.runs.values()
    return run


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own lines; the client's go to its debug.log, and reach pytest alone."""
    return [record.message for record in caplog.records if record.name.startswith("tpresearch")]


def logged(run: FakeRun) -> list[dict]:
    return [{name: value for name, value in r.items() if not name.startswith("_")} for r in run.history]


def sync(server: FakeWandb, *folders: Path) -> None:
    command = [str(Path(sys.executable).parent / "wandb"), "sync", "--include-online", *map(str, folders)]
    environment = os.environ | server.env()
    del environment["WANDB_MODE"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=600)
