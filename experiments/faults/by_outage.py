"""Real commands under failures of disk, W&B, scheduler or hosts, and how a second start recovers."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from faults.commands import STEPS, Command, Commands, Started, alive, expect, killed
from filelock import FileLock
from support import fake_slurm
from support.arrivals import logged, only_run, sync
from support.fake_wandb import FakeWandb

from tpresearch.checkpoint.disk import step_folders
from tpresearch.track.record import read_summary


def disk_is_full(commands: Commands, cwd: Path) -> None:
    """ulimit -f: no checkpoint can be written, and the run says so and fails at its end; without it, it is done"""
    limit = 100_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    expect("code", commands.python(cwd, preexec_fn=limited).code(), 1)
    summary = read_summary(cwd / "run")
    expect("status", (summary["status"], summary["steps"]), ("failed", STEPS))
    expect("what is called a checkpoint", step_folders(cwd / "run"), [])
    expect("drafts", list((cwd / "run" / "checkpoints").glob(".step*")), [])
    expect("code", commands.python(cwd).code(), 0)


def wandb_is_down(commands: Commands, cwd: Path) -> None:
    """W&B stops to answer, then the run is killed; it goes on once W&B is back, and W&B has each row once"""
    with FakeWandb() as server:
        logger = ("logger=wandb", "logger.mode=online")
        job = commands.python(cwd, *logger, env=server.env())
        job.wait_for_rows(15)
        server.fail = 500
        job.wait_for_rows(45)
        killed(cwd, job.process.pid)
        job.code()
        server.fail = None
        expect("code", commands.python(cwd, *logger, env=server.env()).code(), 0)
        steps = [row["train/step"] for row in logged(only_run(server))]
        expect("rows that arrived", steps, list(range(1, STEPS + 1)))


def a_host_is_lost(commands: Commands, cwd: Path) -> None:
    """Two agents with --nnodes=1:2, and the second is killed: the first goes on with the ranks that are left"""
    agent = (
        "--nnodes=1:2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port_of(cwd)}",
        "--rdzv-id=x",
        "--max-restarts=3",
    )
    first = commands.torchrun(1, cwd, "parallel=fsdp", agent=agent)
    second = commands.torchrun(1, cwd, "parallel=fsdp", agent=agent)
    first.wait_for_rows(15)
    os.killpg(second.process.pid, signal.SIGKILL)
    for pid in alive(cwd):
        if os.getsid(pid) == second.process.pid:
            os.kill(pid, signal.SIGKILL)
    second.code()
    expect("code", first.code(), 0)


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A disk of 12 MB at this folder, of which a copy is left. It takes root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", folder], check=True)
    try:
        yield folder
        shutil.copytree(folder, folder.with_suffix(".kept"))
    finally:
        subprocess.run(["umount", folder], check=True)
        folder.rmdir()
    folder.with_suffix(".kept").rename(folder)


def disk_fills_up(commands: Commands, cwd: Path) -> None:
    """The disk fills up during a run, which warns and fails at its end; once there is room again, resume=run"""
    with small_disk(cwd / "run") as run:
        job = commands.torchrun(2, cwd, "parallel=ddp")
        job.wait_for_rows(25)
        with (run / "full").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                pass
        expect("the agent's code", job.code(), 1)
        said = (cwd / "said.txt").read_text()
        expect("lines on the rows", said.count("rows wait for room"), 1)
        expect("the last checkpoint's lines", said.count("no checkpoint of the last step"), 2)
        expect("traceback", said.count("Traceback"), 0)
        (run / "full").unlink()
        expect("code", commands.torchrun(2, cwd, "resume=run").code(), 0)


def folder_is_removed(commands: Commands, cwd: Path) -> None:
    """The run folder is removed during a run, which leaves its record there again"""
    job = commands.torchrun(2, cwd, "parallel=tp")
    job.wait_for_rows(25)
    (cwd / "run").rename(cwd / "gone")
    shutil.rmtree(cwd / "gone")
    expect("code", job.code(), 0)
    said = (cwd / "said.txt").read_text()
    expect("lines on it", said.count("was removed while the run went on"), 1)


def wandb_is_offline(commands: Commands, cwd: Path) -> None:
    """Without a network the run is killed and goes on; both parts are synced, and W&B has each row once"""
    for rows in (35, STEPS):
        job = commands.python(cwd, "logger=wandb", "logger.mode=offline")
        if rows < STEPS:
            job.wait_for_rows(rows)
            killed(cwd, job.process.pid)
    expect("code", job.code(), 0)
    with FakeWandb() as server:
        sync(server, *sorted((cwd / "run" / "wandb").glob("offline-run-*")))
        steps = [row["train/step"] for row in logged(only_run(server))]
    expect("rows that arrived", steps, list(range(1, STEPS + 1)))


def sweep_is_killed(commands: Commands, cwd: Path) -> None:
    """SIGKILL to all processes of a sweep in its first job, then to the sweep alone in its second; the same command"""
    words = ("parallel=none,ddp", "world_size=2")
    sweep = commands.sweep(cwd, *words)
    sweep.wait_for_rows(45, "sweep/0")
    killed(cwd, *alive(cwd))
    sweep = commands.sweep(cwd, *words)
    sweep.wait_for_rows(45, "sweep/1")
    killed(cwd, sweep.process.pid)
    expect("code", commands.sweep(cwd, *words).code(), 0)
    resumed = [len(read_summary(cwd / "sweep" / job).get("resumed", [])) for job in ("0", "1")]
    expect("resumptions", resumed, [1, 1])


def slurm_requeues(commands: Commands, cwd: Path) -> None:
    """Slurm's stand-in sends the nodes of a job the signal of its time limit, and requeues it"""
    words = ("hydra/launcher=slurm", "hydra.launcher.gpus=false", "hydra.launcher.ranks_per_node=1")
    env = fake_slurm.install(cwd / "slurm")
    sweep = commands.sweep(cwd, "parallel=fsdp", "world_size=2", *words, env=env)
    sweep.wait_for_rows(35, "sweep/0")
    (nodes,) = (cwd / "slurm").glob("*.nodes")
    for pid in nodes.read_text().split():
        os.kill(int(pid), signal.SIGUSR2)
    expect("code", sweep.code(), 0)
    resumed = len(read_summary(cwd / "sweep" / "0").get("resumed", []))
    expect("resumptions", resumed, 1)


def rank_0_is_refused_alone(commands: Commands, cwd: Path) -> None:
    """Of two hosts the first finds its run folder in use: one line, and the second ends too; then both start again"""

    def started() -> list[Started]:
        agent = ("--nnodes=2", "--master-addr=127.0.0.1", f"--master-port={port_of(cwd)}")
        return [
            commands.torchrun(1, cwd, "parallel=fsdp", agent=(*agent, f"--node-rank={node}"))
            for node in (0, 1)
        ]

    (cwd / "run").mkdir()
    with FileLock(cwd / "run" / ".lock"):
        expect("codes", [job.code() for job in started()], [2, 2])
    errors = [line for line in (cwd / "said.txt").read_text().splitlines() if "error: " in line]
    expect("lines", ["another run is using this folder" in line for line in errors], [True])
    expect("codes", [job.code() for job in started()], [0, 0])


def port_of(cwd: Path) -> int:
    """One that no other command here has."""
    return 20_000 + (os.getpid() * 32 + int(cwd.name.rpartition("-")[2])) % 20_000


BY_OUTAGE: tuple[Command, ...] = (
    disk_is_full,
    disk_fills_up,
    folder_is_removed,
    wandb_is_down,
    wandb_is_offline,
    a_host_is_lost,
    rank_0_is_refused_alone,
    sweep_is_killed,
    slurm_requeues,
)
