"""Commands are run as a user runs them, in an empty folder: each in a process of its own, or in a fork of a warm one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from support.commands import Done, environment, execute, execute_agent, execute_warm, on_path
from support.launches import PROGRAM, Command
from tpresearch.verify.ranks import Ranks


@pytest.fixture
def warm_python(ranks: Ranks, tmp_path: Path) -> Command:
    """`python program.py ARGUMENTS`"""

    def run(*arguments: str, **env: str) -> Done:
        return execute_warm(ranks, None, [str(PROGRAM), *arguments], tmp_path, environment(tmp_path, **env))

    return run


@pytest.fixture
def python_module(tmp_path: Path) -> Command:
    """`python -m program ARGUMENTS`"""

    def run(*arguments: str) -> Done:
        env = environment(tmp_path, **on_path(PROGRAM.parent))
        return execute([sys.executable, "-m", "program", *arguments], tmp_path, env)

    return run


@pytest.fixture
def torchrun(ranks: Ranks, tmp_path: Path) -> Command:
    """`torchrun --nproc-per-node=RANKS program.py ARGUMENTS`"""

    def run(size: int, *arguments: str, restarts: int = 0, **env: str) -> Done:
        options = ["--standalone", f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
        return execute_agent(
            ranks, [*options, str(PROGRAM), *arguments], tmp_path, environment(tmp_path, **env)
        )

    return run


@pytest.fixture
def extra_configs(tmp_path: Path) -> str:
    """An override that adds a folder of a user's own config files, some of them wrong."""
    folder = tmp_path / "mine"
    (folder / "experiment").mkdir(parents=True)
    (folder / "model").mkdir()
    (folder / "optimizer").mkdir()
    head = "# @package _global_\n"
    (folder / "experiment" / "short.yaml").write_text(f"{head}train: {{steps: 7}}\n")
    (folder / "experiment" / "other_model.yaml").write_text(f"{head}defaults:\n  - override /model: llama9\n")
    (folder / "experiment" / "other_key.yaml").write_text(f"{head}train: {{stepz: 4}}\n")
    (folder / "experiment" / "torn.yaml").write_text(f"{head}train: {{steps: [4\n")
    (folder / "optimizer" / "muon.yaml").write_text("_target_: mine.Muon\nlr: 0.02\n")
    (folder / "model" / "unset.yaml").write_text("name: unset\n_target_: a.B\ndim: ???\n")
    return f"hydra.searchpath=[file://{folder}]"


@pytest.fixture
def agent(monkeypatch: pytest.MonkeyPatch) -> TCPStore:
    """The store of torchrun's agent, which this rank shares."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    env = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "any", "RANK": "3"}
    for name, value in (env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}).items():
        monkeypatch.setenv(name, value)
    return store
