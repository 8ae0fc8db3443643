"""Commands are run as a user runs them: in a process of their own, in an empty folder."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from support.launches import PROGRAM, Command, Done, run_command


@pytest.fixture
def python(tmp_path: Path) -> Command:
    """`python program.py ARGUMENTS`"""

    def run(*arguments: str, **env: str) -> Done:
        return run_command([sys.executable, str(PROGRAM), *arguments], tmp_path, env)

    return run


@pytest.fixture
def python_module(tmp_path: Path) -> Command:
    """`python -m program ARGUMENTS`"""
    path = os.pathsep.join([str(PROGRAM.parent), os.environ.get("PYTHONPATH", "")])

    def run(*arguments: str) -> Done:
        return run_command([sys.executable, "-m", "program", *arguments], tmp_path, {"PYTHONPATH": path})

    return run


@pytest.fixture
def torchrun(tmp_path: Path) -> Command:
    """`torchrun --nproc-per-node=RANKS program.py ARGUMENTS`"""

    def run(ranks: int, *arguments: str, restarts: int = 0, **env: str) -> Done:
        agent = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        return run_command([*agent, f"--max-restarts={restarts}", str(PROGRAM), *arguments], tmp_path, env)

    return run


@pytest.fixture
def extra_configs(tmp_path: Path) -> str:
    """An override that adds a folder of a user's own config files, some of them wrong."""
    folder = tmp_path / "mine"
    (folder / "experiment").mkdir(parents=True)
    (folder / "model").mkdir()
    head = "# @package _global_\n"
    (folder / "experiment" / "short.yaml").write_text(f"{head}train: {{steps: 7}}\n")
    (folder / "experiment" / "other_model.yaml").write_text(f"{head}defaults:\n  - override /model: llama9\n")
    (folder / "experiment" / "other_key.yaml").write_text(f"{head}train: {{stepz: 4}}\n")
    (folder / "experiment" / "torn.yaml").write_text(f"{head}train: {{steps: [4\n")
    (folder / "model" / "unset.yaml").write_text("name: unset\n_target_: a.B\ndim: ???\n")
    return f"hydra.searchpath=[file://{folder}]"
