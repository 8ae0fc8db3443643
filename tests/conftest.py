"""What tests share: composed configs, a corpus that needs no files, a pool of ranks, and a W&B of their own."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from support import parsed_once  # noqa: F401
from support.fake_wandb import FakeWandb

from tpresearch.track.wandb_run import SETTINGS
from tpresearch.verify.ranks import _CONTEXT, Ranks

pytest_plugins = ("support.launch_fixtures",)

# Vectors of a CPU are torch's, and cost the C++ compiler a second per kernel.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

torch.set_num_threads(1)  # the others of a pool would spin for cores that tests beside this one use

gc.disable()  # until all tests are imported, which leaves nothing to collect

# A shell starts jobs in the background with Ctrl-C ignored, which tests of Ctrl-C would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write tests/golden again")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test is of one kind: `cli` where its file says so, `ranks` where it asks for them, else `unit`."""
    for item in items:
        if item.get_closest_marker("cli"):
            continue
        fixtures = getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.ranks if "ranks" in fixtures else pytest.mark.unit)


def pytest_collection_finish() -> None:
    """What has been imported stays: no later collection goes through it. Whichever test is the first to fork, the server
    is this one: modules that set another list are imported by now."""
    _CONTEXT.set_forkserver_preload(["support.warmed"])
    gc.freeze()
    gc.enable()


def _start_with_path(start: Callable[[], None] = forkserver.ensure_running) -> None:
    """Start the server with this folder first in its PYTHONPATH, from which it imports `support`."""
    with pytest.MonkeyPatch.context() as patch:
        if not vars(forkserver._forkserver)["_forkserver_pid"]:
            patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        start()


forkserver.ensure_running = vars(forkserver._forkserver)["ensure_running"] = _start_with_path


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    ranks = Ranks()
    ranks.start()  # before a test changes the environment, which ranks have from the server
    return ranks


@pytest.fixture
def terminal() -> Iterator[None]:
    """SIGHUP as from a terminal: under nohup it is ignored, which this process has inherited."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def own_graphs() -> Iterator[None]:
    """The compiler knows of no graph of another test, and no other of those of this one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
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
