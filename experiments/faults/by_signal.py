"""Real commands that are stopped, interrupted and killed, and how a second start recovers."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from faults.commands import Command, Commands, expect, killed, ranks_of

from tpresearch.checkpoint.disk import step_folders
from tpresearch.track.record import read_summary


def agent_is_told_to_stop(commands: Commands, cwd: Path) -> None:
    """SIGTERM to torchrun's agent; resume=run under another plan"""
    job = commands.torchrun(2, cwd, "parallel=tp")
    job.wait_for_rows(25)
    job.process.terminate()
    expect("the agent's code", job.code(), 143)
    summary = read_summary(cwd / "run")
    expect("status", summary["status"], "preempted")
    expect("the newest checkpoint", step_folders(cwd / "run")[-1].name, f"step-{summary['steps']:08d}")
    expect("code", commands.torchrun(2, cwd, "resume=run", "parallel=fsdp").code(), 0)


def agent_is_killed(commands: Commands, cwd: Path) -> None:
    """SIGKILL to torchrun's agent; the same command again"""
    job = commands.torchrun(2, cwd, "parallel=fsdp")
    job.wait_for_rows(35)
    killed(cwd, job.process.pid)
    job.code()
    expect("code", commands.torchrun(2, cwd, "parallel=fsdp").code(), 0)


def rank_is_killed(commands: Commands, cwd: Path) -> None:
    """SIGKILL to a rank under --max-restarts=1"""
    job = commands.torchrun(2, cwd, "parallel=fsdp", agent=("--standalone", "--max-restarts=1"))
    job.wait_for_rows(45)
    os.kill(ranks_of(cwd)[-1], signal.SIGKILL)
    expect("code", job.code(), 0)
    expect("resumptions", len(read_summary(cwd / "run").get("resumed", [])), 1)


def restarted_from_never(commands: Commands, cwd: Path) -> None:
    """SIGKILL to a rank under --max-restarts=1 and resume=never, which is about what was there before"""
    job = commands.torchrun(
        2, cwd, "parallel=ddp", "resume=never", agent=("--standalone", "--max-restarts=1")
    )
    job.wait_for_rows(45)
    os.kill(ranks_of(cwd)[0], signal.SIGKILL)
    expect("code", job.code(), 0)
    expect("resumptions", len(read_summary(cwd / "run").get("resumed", [])), 1)


def ctrl_c(commands: Commands, cwd: Path) -> None:
    """Ctrl-C to one process; resume=run on four ranks"""
    job = commands.python(cwd)
    job.wait_for_rows(15)
    job.process.send_signal(signal.SIGINT)
    expect("code", job.code(), 130)
    expect("status", read_summary(cwd / "run")["status"], "interrupted")
    expect("code", commands.torchrun(4, cwd, "resume=run", "parallel=fsdp_tp").code(), 0)


def killed_twice(commands: Commands, cwd: Path) -> None:
    """SIGKILL to one process, twice; the same command each time"""
    for rows in (25, 65):
        job = commands.python(cwd)
        job.wait_for_rows(rows)
        job.process.kill()
        job.code()
    expect("code", commands.python(cwd).code(), 0)


def killed_before_a_checkpoint(commands: Commands, cwd: Path) -> None:
    """SIGKILL before the first checkpoint; the same command sets that record aside and begins anew"""
    job = commands.python(cwd, "checkpoint.every=100")
    job.wait_for_rows(3)
    job.process.kill()
    job.code()
    expect("code", commands.python(cwd).code(), 0)


def from_an_older_step(commands: Commands, cwd: Path) -> None:
    """resume=run/checkpoints/step-..., an older one, after the run was complete: later rows and folders are set aside"""
    expect("code", commands.python(cwd, "checkpoint.keep_every=50").code(), 0)
    expect("code", commands.python(cwd, "resume=run/checkpoints/step-00000050", "parallel=none").code(), 0)
    cut = [path.name for path in (cwd / "run" / "checkpoints").glob("*.cut")]
    expect("what is set aside", "step-00000120.cut" in cut, True)


def another_rate(commands: Commands, cwd: Path) -> None:
    """resume=run optimizer.lr=0.1 is refused in one line and touches nothing; then it goes on"""
    job = commands.python(cwd)
    job.wait_for_rows(25)
    job.process.terminate()
    job.code()
    before = changed_at(cwd / "run")
    (cwd / "said.txt").write_text("")
    expect("code", commands.python(cwd, "resume=run", "optimizer.lr=0.1").code(), 2)
    expect("what was touched", sorted(changed_at(cwd / "run") - before), [])
    expect("lines said", len((cwd / "said.txt").read_text().splitlines()), 1)
    expect("code", commands.python(cwd, "resume=run").code(), 0)


def changed_at(run: Path) -> set[tuple[Path, int]]:
    return {(path, path.stat().st_mtime_ns) for path in run.rglob("*") if path.name != ".lock"}


def rank_is_killed_for_good(commands: Commands, cwd: Path) -> None:
    """SIGKILL to a rank without restarts, which ends all; resume=run on one process"""
    job = commands.torchrun(2, cwd, "parallel=sp")
    job.wait_for_rows(35)
    os.kill(ranks_of(cwd)[0], signal.SIGKILL)
    expect("the agent's code", job.code(), 1)
    expect("code", commands.python(cwd, "resume=run", "parallel=none").code(), 0)


def agent_is_told_to_stop_at_once(commands: Commands, cwd: Path) -> None:
    """SIGTERM to torchrun's agent before there is a row; the same command again"""
    job = commands.torchrun(2, cwd, "parallel=fsdp")
    while not ranks_of(cwd):
        time.sleep(0.01)
    job.process.terminate()
    expect("the agent's code", job.code(), 143)
    expect("code", commands.torchrun(2, cwd, "parallel=fsdp").code(), 0)


def agent_is_told_to_stop_while_it_writes(commands: Commands, cwd: Path) -> None:
    """SIGTERM to the agent of a run that saves beside its steps; the same command, then SIGKILL, then again"""
    job = commands.torchrun(2, cwd, "parallel=fsdp", "checkpoint.background=true", "checkpoint.every=2")
    job.wait_for_rows(21)
    job.process.terminate()
    expect("the agent's code", job.code(), 143)
    expect("status", read_summary(cwd / "run")["status"], "preempted")
    job = commands.torchrun(2, cwd, "parallel=fsdp", "checkpoint.background=true", "checkpoint.every=2")
    job.wait_for_rows(81)
    for pid in ranks_of(cwd):
        os.kill(pid, signal.SIGKILL)
    expect("the agent's code", job.code(), 1)
    expect("code", commands.torchrun(2, cwd, "parallel=fsdp").code(), 0)


BY_SIGNAL: tuple[Command, ...] = (
    agent_is_told_to_stop,
    agent_is_told_to_stop_at_once,
    agent_is_told_to_stop_while_it_writes,
    agent_is_killed,
    rank_is_killed,
    rank_is_killed_for_good,
    restarted_from_never,
    ctrl_c,
    killed_twice,
    killed_before_a_checkpoint,
    from_an_older_step,
    another_rate,
)
