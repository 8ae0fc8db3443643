"""`hydra/launcher=slurm`: what Slurm is asked, and real runs through it, on two nodes that are both this machine."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from submitit.helpers import DelayedSubmission
from support import fake_slurm
from support.commands import Done
from support.processes import wait_for
from support.trainings import Start

pytestmark = pytest.mark.cli
Sweep = Callable[..., tuple[Done, list[dict[str, str]]]]
ONE_PER_NODE = ("hydra.launcher.ranks_per_node=1", "hydra.launcher.gpus=false")


@pytest.fixture
def sweep(train: Start, small: list[str], tmp_path: Path) -> Sweep:
    words = [word for word in small if not word.startswith(("model=", "train.steps="))]
    words += ["model=toy_mlp", "train.steps=2", "logger=none"]
    words += ["hydra/launcher=slurm", "hydra.sweep.dir=sweep"]

    def run(*typed: str, **env: str) -> tuple[Done, list[dict[str, str]]]:
        done = train(None, tmp_path, "-m", *words, *typed, **env)
        table = tmp_path / "sweep/summary.csv"
        return done, list(csv.DictReader(table.open())) if table.exists() else []

    return run


def test_jobs_of_a_shape_are_one_array_with_an_agent_a_node(sweep: Sweep, tmp_path: Path) -> None:
    """The first task of the array trains; the node of the second fails."""
    slurm = tmp_path / "slurm"
    typed = ["parallel=tp,fsdp", "world_size=2", *ONE_PER_NODE]
    typed += ["hydra.launcher.partition=fat", "hydra.launcher.timeout_min=7"]
    (tmp_path / "sweep/0").mkdir(parents=True)  # as a job leaves that was never begun
    typed += ["hydra.launcher.setup=[echo ready]", "+hydra.launcher.sbatch.reservation=mine"]
    done, (trained, lost) = sweep(*typed, **fake_slurm.install(slurm), FAKE_SLURM_LOST="1")
    assert done.code == 1, done.out + done.err
    assert (trained["parallel"], trained["status"]) == ("tp", "completed")
    assert json.loads((tmp_path / trained["folder"] / "summary.json").read_text())["world_size"] == 2
    assert 0 < float(trained["train/loss"]) < 10
    assert (lost["parallel"], lost["status"]) == ("fsdp", "failed")
    assert lost["error"].startswith("SlurmError: job 41_1 ended as NODE_FAIL without a result; see ")
    (script,) = slurm.glob("*.sh")
    asked = script.read_text().splitlines()
    assert {
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=1",
        "#SBATCH --array=0-1%2",
        "#SBATCH --partition=fat",
        "#SBATCH --time=7",
        "#SBATCH --reservation=mine",
        "echo ready",
        "#SBATCH --cpus-per-task=1",
    } <= set(asked)
    assert any(line.startswith("srun ") and "--cpus-per-task=1" in line for line in asked)
    assert not any("gpu" in line for line in asked)
    assert (tmp_path / "sweep/0/console.log").exists()
    assert (tmp_path / "sweep/0/console-node1.log").exists()


def test_a_sweep_that_is_started_in_a_job_passes_nothing_of_that_on(sweep: Sweep, tmp_path: Path) -> None:
    """As in a shell of `srun --pty`: ranks would be bound to its cores, and submitit look for the files of its array."""
    own = {
        "SLURM_JOB_ID": "7",
        "SLURM_ARRAY_JOB_ID": "7",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_CONF": "/etc/slurm.conf",
    }
    own |= {"SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SBATCH_ACCOUNT": "mine"}
    setup = f"hydra.launcher.setup=['env > {tmp_path}/env']"
    done, (job,) = sweep(
        "parallel=none", setup, *ONE_PER_NODE, **fake_slurm.install(tmp_path / "slurm"), **own
    )
    assert (done.code, job["status"]) == (0, "completed"), done.out + done.err
    passed_on = dict(
        line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line
    )
    assert passed_on["SLURM_JOB_ID"] == "41"
    assert passed_on.keys() & own.keys() == {"SLURM_JOB_ID", "SLURM_CONF", "SBATCH_ACCOUNT"}


def test_nodes_are_asked_for_what_ranks_need_and_after_a_refusal_all_is_withdrawn(
    sweep: Sweep, tmp_path: Path
) -> None:
    slurm = fake_slurm.install(tmp_path / "slurm")
    needs = {"ranks_per_node": 2, "cpus_per_slot": 3, "mem_gb": 5, "account": "ours", "qos": "high"}
    typed = [f"hydra.launcher.{key}={value}" for key, value in (needs | {"constraint": "fast"}).items()]
    done, _ = sweep("parallel=fsdp", "world_size=2,4", *typed, **slurm, FAKE_SLURM_NODES="1")
    assert done.code == 2
    said = "error: hydra/launcher=slurm: sbatch refuses 2 nodes: sbatch: error: Node co"
    assert done.refusal.startswith(said)
    assert (tmp_path / "slurm/41.state").read_text() == "CANCELLED"
    of_one_job = (tmp_path / "slurm/41.sh").read_text()
    asked = "nodes=1", "gpus-per-node=2", "cpus-per-task=6", "mem=5GB", "account=ours", "qos=high"
    asked += ("constraint=fast", "job-name=tpresearch", "signal=USR2@180")
    assert {f"#SBATCH --{each}" for each in asked} <= {*of_one_job.splitlines()}
    assert "--array" not in of_one_job
    (file,) = (tmp_path / "sweep/slurm/41").glob("*.pkl")
    agent: Any = DelayedSubmission.load(file).function
    assert (agent.ranks_per_node, agent.threads) == (2, 3)
    assert not (tmp_path / "slurm/42.state").exists()


@pytest.mark.exhaustive
def test_through_submitits_stand_in_a_failure_stays_its_own(sweep: Sweep, tmp_path: Path) -> None:
    typed = ["hydra.launcher.cluster=local", "hydra.launcher.gpus=false", "parallel=tp", "world_size=2"]
    typed += ["optimizer=sgd", "optimizer.lr=1e30,1e-3", "train.clip_grad_norm=null"]
    typed += ["schedule.warmup_steps=0"]
    done, (failed, completed) = sweep(*typed)
    assert done.code == 1, done.out + done.err
    assert (failed["status"], completed["status"]) == ("failed", "completed")
    assert failed["error"].startswith("NonfiniteError: train/loss is nan at step 2; ")


def test_a_machine_without_slurm_is_told_at_once(sweep: Sweep, tmp_path: Path) -> None:
    done, _ = sweep("parallel=tp")
    assert done.code == 2
    assert done.refusal.startswith("error: hydra/launcher=slurm: there is no srun on this machine; ")
    assert not (tmp_path / "sweep").exists()


@pytest.mark.exhaustive
def test_a_job_at_its_time_limit_saves_and_goes_on(sweep: Sweep, tmp_path: Path) -> None:
    slurm, run = tmp_path / "slurm", tmp_path / "sweep" / "0"
    typed = ["parallel=fsdp", "world_size=2", *ONE_PER_NODE]
    typed += ["train.steps=300", "train.eval_every=null", "checkpoint.every=null"]
    env = fake_slurm.install(slurm)

    def signal_once() -> None:
        wait_for(lambda: (run / "metrics.jsonl").exists() and len((run / "metrics.jsonl").read_text()) > 5000)
        (nodes,) = slurm.glob("*.nodes")
        for pid in nodes.read_text().split():  # as Slurm does, to every node
            os.kill(int(pid), signal.SIGUSR2)

    with ThreadPoolExecutor(1) as beside:
        signalled = beside.submit(signal_once)
        done, rows = sweep(*typed, **env)
        signalled.result()
    assert done.code == 0, done.out + done.err
    assert [row["status"] for row in rows] == ["completed"]
    (resumed,) = json.loads((run / "summary.json").read_text())["resumed"]
    assert 0 < resumed["step"] < 300
    steps = [json.loads(line)["train/step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 301))
