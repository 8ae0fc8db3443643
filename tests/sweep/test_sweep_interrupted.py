"""A sweep that is stopped, in whatever way, ends all its ranks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import environment
from support.launches import PROGRAM
from support.marks import exhaustive
from support.processes import marked, wait_for

pytestmark = [
    pytest.mark.cli,
    pytest.mark.timeout(600),
    pytest.mark.skipif(sys.platform != "linux", reason="processes are found by /proc"),
]


@pytest.fixture
def sweep(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """A sweep of two jobs of so many ranks each, the first of which is running."""
    ranks = request.param
    plan = ["parallel=none"] if ranks == 1 else ["parallel=tp", f"world_size={ranks}"]
    typed = ["-m", "name=sleeps", *plan, "train.seed=0,1", "hydra.sweep.dir=sweep"]
    command, env = [sys.executable, str(PROGRAM), *typed], environment(SWEEP_TEST=str(tmp_path))
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            wait_for(lambda: (tmp_path / "sweep/0/asleep").exists() or process.poll() is not None)
            of_job = 1 if ranks == 1 else 1 + ranks  # torchrun and its ranks
            assert len(marked(f"SWEEP_TEST={tmp_path}")) >= 1 + of_job
            yield process
        finally:
            for pid in marked(f"SWEEP_TEST={tmp_path}"):
                os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("sweep", [2], indirect=True)
def test_ctrl_c_leaves_no_process_behind(sweep: subprocess.Popen[str], tmp_path: Path) -> None:
    sweep.send_signal(signal.SIGINT)
    out, _ = sweep.communicate()
    assert sweep.returncode == 130
    assert marked(f"SWEEP_TEST={tmp_path}") == []
    assert "job 0 preempted" in out
    assert "job 1 starts" not in out
    assert "not started" in (tmp_path / "sweep/summary.md").read_text()


@pytest.mark.parametrize("sweep", [1, exhaustive(2)], indirect=True)
def test_a_sweep_that_is_killed_takes_its_jobs_with_it(sweep: subprocess.Popen[str], tmp_path: Path) -> None:
    """That ranks end with a torchrun that ends so, tests/launch/test_stop.py has."""
    sweep.kill()
    sweep.communicate()
    wait_for(lambda: not marked(f"SWEEP_TEST={tmp_path}"))
