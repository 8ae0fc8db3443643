"""Ctrl-C ends all ranks of a sweep and leaves no process behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import NOT_OURS
from support.launches import PROGRAM

pytestmark = [
    pytest.mark.cli,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="processes are found by /proc"),
]


def processes(mark: str) -> list[int]:
    """Those whose environment has this in it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(true: Callable[[], object], patience_s: float = 240) -> None:
    until = time.monotonic() + patience_s
    while not true():
        assert time.monotonic() < until
        time.sleep(0.2)


def test_ctrl_c_leaves_no_process_behind(tmp_path: Path) -> None:
    mark = f"SWEEP_TEST={tmp_path}"
    env = {key: value for key, value in os.environ.items() if not key.startswith(NOT_OURS)}
    env |= {"OMP_NUM_THREADS": "1", "SWEEP_TEST": str(tmp_path)}
    typed = ["-m", "name=sleeps", "parallel=tp", "world_size=2", "train.seed=0,1", "hydra.sweep.dir=sweep"]
    command = [sys.executable, str(PROGRAM), *typed]
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as sweep:
        try:
            wait_for(lambda: (tmp_path / "sweep/0/asleep").exists() or sweep.poll() is not None)
            assert len(processes(mark)) >= 4  # the sweep, torchrun, and two ranks
            sweep.send_signal(signal.SIGINT)
            out, _ = sweep.communicate(timeout=240)
        finally:
            for pid in processes(mark):
                os.kill(pid, signal.SIGKILL)
                out = f"left behind: {pid}"
    assert sweep.returncode == 130
    assert "left behind" not in out
    assert "job 0 preempted" in out
    assert "job 1 starts" not in out
    assert "not started" in (tmp_path / "sweep/summary.md").read_text()
