"""`train.py` on a CUDA device, the shortest first: a profile, a bad update skipped, compiled, killed and going on, ranks that share the card."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from support.commands import TORCHRUN, environment, execute, on_path
from support.trainings import TRAIN, Trained

pytestmark = [
    pytest.mark.cli,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
HALF = ("train.dtype=bfloat16", "parallel=none", "schedule=constant", "logger=none", "device=cuda")
# Llama2 whose logits overflow in the second step.
POISONED = """
from tpresearch.models.llama2 import Llama2


class Poisoned(Llama2):
    calls = 0

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        self.calls += 1
        return out * float("inf") if self.calls == 2 else out
"""
EARLY = ("profiler.first_step=3", "profiler.steps=2", "train.steps=6")
SEES_ALL = {"CUDA_VISIBLE_DEVICES": "0"}


def command(small: list[str], *overrides: str) -> list[str]:
    return [sys.executable, str(TRAIN), *small, *HALF, *overrides]


def train(folder: Path, home: Path, small: list[str], *overrides: str) -> Trained:
    done = execute(
        command(small, *overrides, f"hydra.run.dir={folder}"), folder.parent, environment(home, **SEES_ALL)
    )
    assert done.code == 0, done.err
    return Trained(done, folder)


def test_a_profile_and_a_memory_snapshot(small: list[str], home: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", home, small, "profiler=trace", "profiler.memory=true", *EARLY)
    (found,) = run.folder.rglob("kernels-rank0.json")
    kernels = json.loads(found.read_text())
    assert kernels["device"] == "cuda"
    assert {"matmul", "attention", "optimizer", "pointwise"} <= kernels["classes"].keys()
    assert list(run.folder.rglob("trace-rank0.json.gz"))
    assert list(run.folder.rglob("memory-rank0.pickle"))


def test_an_update_that_is_not_finite_is_left_out_without_a_wait(
    small: list[str], home: Path, tmp_path: Path
) -> None:
    (tmp_path / "poisoned.py").write_text(POISONED)
    given = command(small, "model._target_=poisoned.Poisoned", "train.on_nonfinite=skip", "train.steps=5")
    run = [*given, "train.eval_rows=0", f"hydra.run.dir={tmp_path / 'run'}"]
    done = execute(run, tmp_path, environment(home, **SEES_ALL, **on_path(tmp_path)))
    assert done.code == 0, done.err
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert math.isfinite(summary["train/loss"])


def test_compiled_steps_are_the_eager_ones_and_are_timed_and_weighed(
    small: list[str], home: Path, tmp_path: Path
) -> None:
    eager = train(tmp_path / "eager", home, small, "train.steps=5")
    compiled = train(tmp_path / "compiled", home, small, "train.steps=5", "parallel.compile=true")
    assert compiled.column("train/loss") == pytest.approx(eager.column("train/loss"), rel=5e-3)
    for run in (eager, compiled):
        row, summary = run.rows[-1], run.json("summary.json")
        assert all(row[f"time/{phase}_s"] > 0 for phase in ("forward", "backward", "optimizer"))
        assert sum(row[f"time/{phase}_s"] for phase in ("forward", "backward", "optimizer")) <= (
            1.05 * row["perf/step_time_s"]
        )
        assert row["memory/peak_bytes"] > 0
        assert summary["device"] == torch.cuda.get_device_name()
    assert "attention: torch chooses its" in compiled.done.err


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_killed_run_resumes_bitwise_from_checkpoints_written_beside_its_steps(
    small: list[str], home: Path, tmp_path: Path, dtype: str
) -> None:
    settings = (f"train.dtype={dtype}", "train.steps=400", "checkpoint.every=5", "train.eval_rows=0")
    whole = train(tmp_path / "whole", home, small, *settings)
    killed = tmp_path / "killed"
    again = command(small, *settings, f"hydra.run.dir={killed}")
    with subprocess.Popen(again, cwd=tmp_path, env=environment(home, **SEES_ALL)) as process:
        while not (killed / "checkpoints" / "step-00000020").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it has to be killed on its way"
    done = execute(again, tmp_path, environment(home, **SEES_ALL))
    assert done.code == 0, done.err
    on = Trained(done, killed)
    assert on.json("summary.json")["resumed"][0]["step"] >= 20
    assert on.column("train/step") == list(range(1, 401))
    for name in ("train/loss", "train/grad_norm"):
        assert on.column(name) == whole.column(name), name


def test_ranks_that_share_the_card_train_the_2d_plan(small: list[str], home: Path, tmp_path: Path) -> None:
    alone = train(tmp_path / "alone", home, small, "train.dtype=float32")
    torchrun = [str(TORCHRUN), "--standalone", "--nproc-per-node=4", str(TRAIN), *small, *HALF]
    shared = ["parallel=fsdp_tp", "mesh.tp=2", "train.dtype=float32", f"hydra.run.dir={tmp_path / 'shared'}"]
    done = execute([*torchrun, *shared], tmp_path, environment(home, **SEES_ALL))
    assert done.code == 0, done.err
    run = Trained(done, tmp_path / "shared")
    assert run.column("train/loss") == pytest.approx(alone.column("train/loss"), rel=1e-4)


def test_verify_says_ok_on_the_card(home: Path, tmp_path: Path) -> None:
    asked = [sys.executable, "-m", "tpresearch.verify", "verify.plans=[none,fsdp_tp]", "device=cuda"]
    done = execute(asked, tmp_path, environment(home, **SEES_ALL, **on_path(TRAIN.parent)))
    assert done.code == 0, done.out + done.err
    assert "ok" in done.out
