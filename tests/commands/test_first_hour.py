"""The first hour, as a newcomer spends it: from a clone, what the README says to type, then what each command says is next."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import ROOT, Done, environment, execute
from support.processes import wait_for

pytestmark = [pytest.mark.cli, pytest.mark.exhaustive]

SMALL = "model=toy_mlp train.steps=3"
"""Of what `make train` is told: the hints keep it, so that all that follows is as short."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that git has, with the environment that is here already."""
    folder = tmp_path_factory.mktemp("first_hour") / "tpresearch"
    for name in execute(["git", "ls-files", "-z"], ROOT, environment()).out.split("\0")[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
    return folder


@pytest.fixture(scope="module")
def env(clone: Path) -> dict[str, str]:
    path = f"{clone / '.venv/bin'}{os.pathsep}{os.environ['PATH']}"
    return environment(clone.parent, PATH=path, PYTHONPATH=str(clone))


@pytest.fixture(scope="module")
def typed(clone: Path, env: dict[str, str]) -> Callable[[str], Done]:
    def run(command: str) -> Done:
        done = execute(["bash", "-c", command], clone, env)
        assert done.code == 0, f"{command}\n{done.out[-2000:]}\n{done.err[-4000:]}"
        assert "Traceback" not in done.err
        return done

    return run


def what_is_next(done: Done) -> list[str]:
    after = done.out.partition("\nnext\n")[2]
    return [line.partition("  # ")[0].strip() for line in after.splitlines() if line.startswith("  ")]


def runs_of(clone: Path) -> set[Path]:
    return set(clone.glob("outputs/train/*/*/metrics.jsonl"))


def test_from_a_clone_to_a_run_that_resumes(
    clone: Path, env: dict[str, str], typed: Callable[[str], Done]
) -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```", (clone / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks[:2] for line in block.splitlines()]
    first, *rest = [line.partition("  # ")[0].strip() for line in lines]
    assert (first, len(rest)) == ("make train", 2)
    minutes = sum(
        float(m) * {"s": 1 / 60, "minutes": 1}[unit]
        for m, unit in re.findall(r"about (\d+) (s|minutes)", " ".join(lines))
    )
    assert minutes < 5

    made = typed(f"make -o .venv/.ready train ARGS='{SMALL}'")
    assert "training a BPE" in made.err  # its progress is seen, whichever rank prepares
    assert "waiting for" not in made.err
    for command in rest:
        typed(command)

    another, sweep, look, cat = what_is_next(made)
    assert all(word in shlex.split(another) for word in SMALL.split())
    assert len(what_is_next(typed(another))) == 4
    table = typed(sweep).out
    for command in (look, cat):
        assert "tp: Shard(0)" in typed(command).out
    (compare,) = re.findall(r"python -m tpresearch\.compare \S+", table)
    assert "max |loss difference|" in typed(compare).out

    before, pipes = runs_of(clone), {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    longer = shlex.split(another.replace("train.steps=3", "train.steps=100"))
    with subprocess.Popen(longer, cwd=clone, env=env, start_new_session=True, **pipes) as run:
        wait_for(lambda: run.poll() is not None or any(path.read_text() for path in runs_of(clone) - before))
        os.killpg(run.pid, signal.SIGINT)  # as the terminal does
        out, err = run.communicate()
    assert run.returncode == 130, err
    assert "Traceback" not in err
    stopped, _, resumes = out.partition("stopped by SIGINT after step ")[2].partition("; to resume: ")
    ended = typed(resumes.splitlines()[0])
    assert f"step {stopped}" in ended.err
    assert "100 (" in ended.out
    assert "completed" in ended.out
