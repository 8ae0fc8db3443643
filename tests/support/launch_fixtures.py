"""Commands are run as a user runs them, in an empty folder: each in a process of its own, or in a fork of a warm one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.launches import PROGRAM, Command, Done, environment, run_command


@pytest.fixture
def python(tmp_path: Path) -> Command:
    """`python program.py ARGUMENTS`"""

    def run(*arguments: str, **env: str) -> Done:
        return run_command([sys.executable, str(PROGRAM), *arguments], tmp_path, env)

    return run


@pytest.fixture(scope="session")
def warm_program() -> Iterator[subprocess.Popen[str]]:
    """A Python that has imported what a program imports, and torch."""
    path = os.pathsep.join([str(PROGRAM.parents[1]), os.environ.get("PYTHONPATH", "")])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command, env = [sys.executable, "-m", "support.warm"], environment(PYTHONPATH=path)
    with subprocess.Popen(command, env=env, **pipes) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def warm_python(warm_program: subprocess.Popen[str], tmp_path: Path) -> Command:
    """`python program.py ARGUMENTS` at a tenth of its cost; that torch is not imported, it cannot show."""

    def run(*arguments: str, **env: str) -> Done:
        asked = {"script": str(PROGRAM), "arguments": arguments, "cwd": str(tmp_path), "env": env}
        assert warm_program.stdin
        assert warm_program.stdout
        warm_program.stdin.write(json.dumps(asked) + "\n")
        warm_program.stdin.flush()
        return Done(cpu_seconds=0, **json.loads(warm_program.stdout.readline()))

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
