"""Real commands, real agents and real signals: what `torchrun`, a scheduler and a full disk do to a run."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.exam import TOLERANCE, Survived, rows_of, unsound
from support.arrivals import logged, only_run
from support.checkpointed import apart, on_disk
from support.commands import ROOT, TORCHRUN, environment
from support.fake_wandb import FakeWandb
from support.processes import runs

from tpresearch.checkpoint.disk import step_folders
from tpresearch.track.record import read_summary

STEPS, EVERY = 120, 10
JOB = [
    "model=llama2_debug",
    "data=random_tokens",
    "data.seq_len=16",
    "tokenizer.vocab_size=260",
    "train.global_batch_size=8",
    "train.dtype=float64",
    "train.eval_every=null",
    f"train.steps={STEPS}",
    f"checkpoint.every={EVERY}",
]
GIVEN_UP_S = 600


class Started:
    """A command in a session of its own."""

    def __init__(self, words: list[str], cwd: Path, env: dict[str, str], **how: Any) -> None:
        said = (cwd / "said.txt").open("a")
        self.process = subprocess.Popen(
            words, cwd=cwd, env=env, stdout=said, stderr=said, start_new_session=True, **how
        )

    def code(self) -> int:
        return self.process.wait(GIVEN_UP_S)


class Commands:
    """Runs the commands of `COMMANDS`, each in a folder of its own, and holds them to one run that nothing befell."""

    def __init__(self, out: Path) -> None:
        # A shell starts jobs in the background with Ctrl-C ignored, which these commands would inherit.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.out, self.home = out, out / "home"
        self.home.mkdir()
        undisturbed = self._folder("undisturbed-command")
        assert self.python(undisturbed).code() == 0, (undisturbed / "said.txt").read_text()[-2000:]
        self.whole = rows_of(undisturbed / "run"), on_disk(step_folders(undisturbed / "run")[-1])

    def _folder(self, name: str) -> Path:
        folder = self.out / name
        folder.mkdir()
        return folder

    def python(self, cwd: Path, *more: str, **how: Any) -> Started:
        return self._start([sys.executable], cwd, ["parallel=none", *more], how)

    def torchrun(
        self, ranks: int, cwd: Path, *more: str, agent: tuple[str, ...] = ("--standalone",), **how: Any
    ) -> Started:
        return self._start([str(TORCHRUN), *agent, f"--nproc-per-node={ranks}"], cwd, list(more), how)

    def _start(self, starter: list[str], cwd: Path, more: list[str], how: dict[str, Any]) -> Started:
        goes_on = any(word.startswith("resume=run") for word in more)
        job = [] if goes_on else [*JOB, f"hydra.run.dir={cwd}/run"]
        logger = [] if any(word.startswith("logger") for word in more) or goes_on else ["logger=none"]
        env = environment(self.home) | how.pop("env", {}) | {"TPRESEARCH_FAULT": str(cwd)}
        return Started([*starter, str(ROOT / "train.py"), *job, *logger, *more], cwd, env, **how)

    def survive(self, number: int) -> Survived:
        command, survived = COMMANDS[number], Survived(number)
        cwd = self._folder(f"command-{number}")
        survived.history = [str(command.__doc__)]
        try:
            survived.problems += command(self, cwd)
            survived.problems += self.compare(cwd, survived)
        except Exception as error:
            survived.problems.append(f"{type(error).__name__}: {error}")
        if not survived.problems:
            shutil.rmtree(cwd)
        return survived

    def compare(self, cwd: Path, survived: Survived) -> list[str]:
        run, (whole_rows, whole_state) = cwd / "run", self.whole
        rows = rows_of(run)
        if [row["train/step"] for row in rows] != list(range(1, STEPS + 1)):
            return [f"rows of {len(rows)} steps"]
        names = ("train/loss", "train/grad_norm", "train/lr")
        figures = [(a[name], b[name]) for a, b in zip(rows, whole_rows, strict=True) for name in names]
        survived.apart = max(abs(a - b) / abs(b) for a, b in figures)
        survived.apart = max(survived.apart, apart(on_disk(step_folders(run)[-1]), whole_state))
        problems = unsound(run)
        if survived.apart > TOLERANCE * 100:  # over 120 steps
            problems.append(f"apart by {survived.apart:.1e}")
        if read_summary(run)["status"] != "completed":
            problems.append(f"status {read_summary(run)['status']}")
        if left := alive(cwd):
            problems.append(f"processes are left: {left}")
        return problems


def alive(cwd: Path) -> list[int]:
    mark = f"TPRESEARCH_FAULT={cwd}\0".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if runs(pid)]


def ranks_of(cwd: Path) -> list[int]:
    """The processes of training, without agents."""
    found = []
    for pid in alive(cwd):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if (
            words[1:2]
            and words[1:2] != [b"-m"]
            and b"torchrun" not in b" ".join(words[:2])
            and b"train.py" in b" ".join(words[:4])
        ):
            found.append(pid)
    return sorted(found)


def wait_for_rows(cwd: Path, count: int) -> None:
    path, until = cwd / "run" / "metrics.jsonl", time.monotonic() + GIVEN_UP_S
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        if time.monotonic() > until:
            raise TimeoutError(f"no {count} rows")
        time.sleep(0.005)


def expect(what: str, found: object, wanted: object) -> list[str]:
    return [] if found == wanted else [f"{what} is {found}, not {wanted}"]


def agent_is_told_to_stop(commands: Commands, cwd: Path) -> list[str]:
    """SIGTERM to torchrun's agent; resume=run under another plan"""
    job = commands.torchrun(2, cwd, "parallel=tp")
    wait_for_rows(cwd, 25)
    job.process.terminate()
    problems = expect("the agent's code", job.code(), 1)
    summary = read_summary(cwd / "run")
    problems += expect("status", summary["status"], "preempted")
    problems += expect(
        "the newest checkpoint", step_folders(cwd / "run")[-1].name, f"step-{summary['steps']:08d}"
    )
    return problems + expect("code", commands.torchrun(2, cwd, "resume=run", "parallel=fsdp").code(), 0)


def agent_is_killed(commands: Commands, cwd: Path) -> list[str]:
    """SIGKILL to torchrun's agent; the same command again"""
    job = commands.torchrun(2, cwd, "parallel=fsdp")
    wait_for_rows(cwd, 35)
    job.process.kill()
    job.code()
    while alive(cwd):
        time.sleep(0.05)
    return expect("code", commands.torchrun(2, cwd, "parallel=fsdp").code(), 0)


def rank_is_killed(commands: Commands, cwd: Path) -> list[str]:
    """SIGKILL to a rank under --max-restarts=1"""
    job = commands.torchrun(2, cwd, "parallel=fsdp", agent=("--standalone", "--max-restarts=1"))
    wait_for_rows(cwd, 45)
    os.kill(ranks_of(cwd)[-1], signal.SIGKILL)
    problems = expect("code", job.code(), 0)
    return problems + expect("resumptions", len(read_summary(cwd / "run").get("resumed", [])), 1)


def restarted_from_never(commands: Commands, cwd: Path) -> list[str]:
    """SIGKILL to a rank under --max-restarts=1 and resume=never, which is about what was there before"""
    job = commands.torchrun(
        2, cwd, "parallel=ddp", "resume=never", agent=("--standalone", "--max-restarts=1")
    )
    wait_for_rows(cwd, 45)
    os.kill(ranks_of(cwd)[0], signal.SIGKILL)
    problems = expect("code", job.code(), 0)
    return problems + expect("resumptions", len(read_summary(cwd / "run").get("resumed", [])), 1)


def ctrl_c(commands: Commands, cwd: Path) -> list[str]:
    """Ctrl-C to one process; resume=run on four ranks"""
    job = commands.python(cwd)
    wait_for_rows(cwd, 15)
    job.process.send_signal(signal.SIGINT)
    problems = expect("code", job.code(), 130)
    problems += expect("status", read_summary(cwd / "run")["status"], "interrupted")
    return problems + expect("code", commands.torchrun(4, cwd, "resume=run", "parallel=fsdp_tp").code(), 0)


def killed_twice(commands: Commands, cwd: Path) -> list[str]:
    """SIGKILL to one process, twice; the same command each time"""
    for rows in (25, 65):
        job = commands.python(cwd)
        wait_for_rows(cwd, rows)
        job.process.kill()
        job.code()
    return expect("code", commands.python(cwd).code(), 0)


def killed_before_a_checkpoint(commands: Commands, cwd: Path) -> list[str]:
    """SIGKILL before the first checkpoint; the same command sets that record aside and begins anew"""
    job = commands.python(cwd, "checkpoint.every=100")
    wait_for_rows(cwd, 3)
    job.process.kill()
    job.code()
    return expect("code", commands.python(cwd).code(), 0)


def from_an_older_step(commands: Commands, cwd: Path) -> list[str]:
    """resume=run/checkpoints/step-..., an older one, after the run was complete: later rows and folders are set aside"""
    problems = expect("code", commands.python(cwd, "checkpoint.keep_every=50").code(), 0)
    problems += expect(
        "code", commands.python(cwd, "resume=run/checkpoints/step-00000050", "parallel=none").code(), 0
    )
    cut = [path.name for path in (cwd / "run" / "checkpoints").glob("*.cut")]
    return problems + ([] if "step-00000120.cut" in cut else [f"set aside: {cut}"])


def another_rate(commands: Commands, cwd: Path) -> list[str]:
    """resume=run optimizer.lr=0.1 is refused in one line and touches nothing; then it goes on"""
    job = commands.python(cwd)
    wait_for_rows(cwd, 25)
    job.process.terminate()
    job.code()
    before = sorted(
        (path, path.stat().st_mtime_ns) for path in (cwd / "run").rglob("*") if path.name != ".lock"
    )
    (cwd / "said.txt").write_text("")
    problems = expect("code", commands.python(cwd, "resume=run", "optimizer.lr=0.1").code(), 2)
    after = sorted(
        (path, path.stat().st_mtime_ns) for path in (cwd / "run").rglob("*") if path.name != ".lock"
    )
    problems += expect("what was touched", [p for p in after if p not in before], [])
    problems += expect("lines said", len((cwd / "said.txt").read_text().splitlines()), 1)
    return problems + expect("code", commands.python(cwd, "resume=run").code(), 0)


def disk_is_full(commands: Commands, cwd: Path) -> list[str]:
    """ulimit -f: no checkpoint can be written, and the run says so and fails at its end; without it, it is done"""
    limit = 100_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    problems = expect("code", commands.python(cwd, preexec_fn=limited).code(), 1)
    summary = read_summary(cwd / "run")
    problems += expect("status", (summary["status"], summary["steps"]), ("failed", STEPS))
    problems += expect("what is called a checkpoint", step_folders(cwd / "run"), [])
    problems += expect("drafts", list((cwd / "run" / "checkpoints").glob(".step*")), [])
    return problems + expect("code", commands.python(cwd).code(), 0)


def wandb_is_down(commands: Commands, cwd: Path) -> list[str]:
    """W&B stops to answer, then the run is killed; it goes on once W&B is back, and W&B has each row once"""
    with FakeWandb() as server:
        logger = ("logger=wandb", "logger.mode=online")
        job = commands.python(cwd, *logger, env=server.env())
        wait_for_rows(cwd, 15)
        server.fail = 500
        wait_for_rows(cwd, 45)
        job.process.kill()
        job.code()
        while alive(cwd):
            time.sleep(0.05)
        server.fail = None
        problems = expect("code", commands.python(cwd, *logger, env=server.env()).code(), 0)
        steps = [row["train/step"] for row in logged(only_run(server))]
        return problems + expect("rows that arrived", steps, list(range(1, STEPS + 1)))


def a_host_is_lost(commands: Commands, cwd: Path) -> list[str]:
    """Two agents with --nnodes=1:2, and the second is killed: the first goes on with the ranks that are left"""
    port = 20_000 + os.getpid() % 20_000
    agent = (
        "--nnodes=1:2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=x",
        "--max-restarts=3",
    )
    first = commands.torchrun(1, cwd, "parallel=fsdp", agent=agent)
    second = commands.torchrun(1, cwd, "parallel=fsdp", agent=agent)
    wait_for_rows(cwd, 15)
    os.killpg(second.process.pid, signal.SIGKILL)
    for pid in alive(cwd):
        if os.getsid(pid) == second.process.pid:
            os.kill(pid, signal.SIGKILL)
    second.code()
    return expect("code", first.code(), 0)


Command = Callable[[Commands, Path], list[str]]
COMMANDS: tuple[Command, ...] = (
    agent_is_told_to_stop,
    agent_is_killed,
    rank_is_killed,
    restarted_from_never,
    ctrl_c,
    killed_twice,
    killed_before_a_checkpoint,
    from_an_older_step,
    another_rate,
    disk_is_full,
    wandb_is_down,
    a_host_is_lost,
)
