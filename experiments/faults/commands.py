"""Runs real commands and compares their results with an undisturbed run. The faults are in by_*.py."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.exam import TOLERANCE, Survived, compare, find_problems, read_reference
from support.commands import ROOT, TORCHRUN, environment, installed
from support.processes import runs

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
TIMEOUT_S = 600


Command = Callable[["Commands", Path], None]
"""Starts a run, has something befall it, starts it again, and raises where anything is not as it should be on the way."""


class Started:
    """A command in a session of its own."""

    def __init__(self, words: list[str], cwd: Path, env: dict[str, str], **how: Any) -> None:
        self.cwd, said = cwd, (cwd / "said.txt").open("a")
        self.process = subprocess.Popen(
            words, cwd=cwd, env=env, stdout=said, stderr=said, start_new_session=True, **how
        )

    def code(self) -> int:
        return self.process.wait(TIMEOUT_S)

    def wait_for_rows(self, count: int, run: str = "run") -> None:
        path, until = self.cwd / run / "metrics.jsonl", time.monotonic() + TIMEOUT_S
        while not path.exists() or path.read_bytes().count(b"\n") < count:
            if time.monotonic() > until or self.process.poll() is not None:
                raise TimeoutError(f"no {count} rows")
            time.sleep(0.005)


class Commands:
    """Runs each command in a folder of its own, and holds them to one run that nothing befell."""

    def __init__(self, out: Path) -> None:
        # A shell starts jobs in the background with Ctrl-C ignored, which these commands would inherit.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        self.out, self.home = out, out / "home"
        self.home.mkdir()
        self.installed = installed(out / "installed")
        undisturbed = self._folder("undisturbed-command")
        assert self.python(undisturbed).code() == 0, (undisturbed / "said.txt").read_text()[-2000:]
        self.whole = read_reference(undisturbed / "run")

    def _folder(self, name: str) -> Path:
        folder = self.out / name
        folder.mkdir()
        return folder

    def python(self, cwd: Path, *more: str, **how: Any) -> Started:
        return self._start([sys.executable], cwd, ["parallel=none", *more], how)

    def sweep(self, cwd: Path, *more: str, **how: Any) -> Started:
        """`train.py -m`, in cwd/sweep."""
        job = [*JOB, f"hydra.sweep.dir={cwd}/sweep", "logger=none", *more]
        return self._started([sys.executable, str(ROOT / "train.py"), "-m", *job], cwd, how)

    def torchrun(
        self, ranks: int, cwd: Path, *more: str, agent: tuple[str, ...] = ("--standalone",), **how: Any
    ) -> Started:
        return self._start([str(TORCHRUN), *agent, f"--nproc-per-node={ranks}"], cwd, list(more), how)

    def _start(self, starter: list[str], cwd: Path, more: list[str], how: dict[str, Any]) -> Started:
        resumes = any(word.startswith("resume=run") for word in more)
        job = [] if resumes else [*JOB, f"hydra.run.dir={cwd}/run"]
        logger = [] if any(word.startswith("logger") for word in more) or resumes else ["logger=none"]
        return self._started([*starter, str(ROOT / "train.py"), *job, *logger, *more], cwd, how)

    def _started(self, words: list[str], cwd: Path, how: dict[str, Any]) -> Started:
        env = environment(self.home) | self.installed | how.pop("env", {}) | {"TPRESEARCH_FAULT": str(cwd)}
        return Started(words, cwd, env, **how)

    def survive(self, number: int, command: Command) -> Survived:
        survived = Survived(number)
        cwd = self._folder(f"command-{number}")
        survived.history = [str(command.__doc__)]
        try:
            command(self, cwd)
            for run in [cwd / "run"] if (cwd / "run").exists() else sorted(cwd.glob("sweep/[0-9]")):
                survived.problems += find_problems(run)
                compare(run, self.whole, survived, 100 * TOLERANCE, keep=None)  # over 120 steps
            if left := alive(cwd):
                survived.problems.append(f"processes are left: {left}")
        except Exception as error:
            survived.problems.append(f"{type(error).__name__}: {error}")
        if not survived.problems:
            shutil.rmtree(cwd)
        return survived


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


def killed(cwd: Path, *pids: int) -> None:
    """SIGKILL to these processes of a command; returns once all of the command's have ended."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    while alive(cwd):
        time.sleep(0.05)


def ranks_of(cwd: Path) -> list[int]:
    """The processes of training, without agents."""
    found = []
    for pid in alive(cwd):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        starts_others = words[1:2] in ([], [b"-m"]) or b"torchrun" in b" ".join(words[:2])
        if not starts_others and b"train.py" in b" ".join(words[:4]):
            found.append(pid)
    return sorted(found)


def expect(what: str, found: object, wanted: object) -> None:
    assert found == wanted, f"{what} is {found}, not {wanted}"
