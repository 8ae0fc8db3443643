"""Commands as a user types them: in a process of their own, or in ranks that are warm; and what they said."""

from __future__ import annotations

import io
import os
import resource
import runpy
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

from support import processes
from tpresearch.agent import handler
from tpresearch.config.world import World
from tpresearch.verify.ranks import RankError, Ranks

ROOT = Path(__file__).parents[2]
TORCHRUN = Path(sys.executable).parent / "torchrun"
NOT_OURS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "TORCHELASTIC_", "SLURM_", "WANDB_", "HYDRA_")
HANG_S = 1500
"""No command takes that long on any machine: it has hung."""


@dataclass(frozen=True)
class Done:
    """What a command said, and how it ended."""

    code: int
    out: str
    err: str
    cpu_seconds: float
    """Of all its processes: what it costs whatever else the machine does."""

    @property
    def refusals(self) -> list[str]:
        """The lines that a refused config is allowed one of."""
        return [line for line in self.err.splitlines() if line.startswith("error:")]

    @property
    def refusal(self) -> str:
        (line,) = self.refusals
        return line

    @property
    def command_to_try(self) -> list[str]:
        """The command that the refusal ends with, in words."""
        return shlex.split(self.refusal.rpartition("; try: ")[2])

    @property
    def folders(self) -> list[str]:
        """The run folder as each rank of `program.py` saw it."""
        return [line.split()[1] for line in self.out.splitlines() if line.startswith("folder ")]

    @property
    def records(self) -> list[str]:
        """Where each rank of `program.py` writes Hydra's record of the config, "None" for one that does not."""
        return sorted(line.split()[2] for line in self.out.splitlines() if line.startswith("folder "))


def environment(home: Path | None = None, /, **more: str) -> dict[str, str]:
    """One thread, no GPU, no account where a home is given, and nothing of a job that the tests may be part of."""
    outside = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(NOT_OURS) and not key.lower().endswith("_proxy")
    }
    ours = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | ({"HOME": str(home)} if home else {})
    return {**outside, **ours, **more}


def execute(command: Sequence[str], cwd: Path, env: dict[str, str]) -> Done:
    """The command in a process of its own."""
    before = _children_s()
    ended = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=HANG_S)
    return Done(ended.returncode, ended.stdout, ended.stderr, _children_s() - before)


def execute_warm(
    ranks: Ranks,
    size: int | None,
    program: Sequence[str],
    cwd: Path,
    env: dict[str, str],
    cold_jobs: bool = False,
) -> Done:
    """`torchrun --nproc-per-node=<size> PROGRAM`, or `python PROGRAM` for None, in forks of a process that has imported torch.

    Args:
        program: a script or `-m` and a module, then its arguments.
        cold_jobs: whether a sweep's jobs are processes of their own, and not such forks too.
    """
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        code, seconds = forked(ranks, size, program, cwd, env, out.name, err.name, cold_jobs)
        return Done(code, out.read(), err.read(), seconds)


def forked(
    ranks: Ranks,
    size: int | None,
    program: Sequence[str],
    cwd: Path,
    env: dict[str, str],
    out: str,
    err: str,
    cold_jobs: bool = False,
) -> tuple[int, float]:
    """Exit code and processor time of such a command, which writes to the files `out` and `err`."""
    with tempfile.TemporaryDirectory() as errors:
        forkserver.ensure_running()
        of_torchrun = None if size is None else Path(errors)
        job = list(program), cwd, env, out, err, of_torchrun, _server(), cold_jobs
        try:
            codes, seconds = zip(*ranks.run(size or 1, _as_main, *job), strict=True)
        except RankError:
            return 1, 0.0
        return max(codes), sum(seconds)


def _as_main(
    world: World,
    program: list[str],
    cwd: Path,
    env: dict[str, str],
    out: str,
    err: str,
    errors: Path | None,
    server: dict[str, object],
    cold_jobs: bool,
) -> tuple[int, float]:
    """Become the command; its exit code and processor time.

    Args:
        errors: where torchrun would keep the ranks' error files; None for `python` alone.
        server: of which ranks are forked that the command starts itself.

    Raises:
        SystemExit: from one rank of several that does not end with 0, which ends the others, as torchrun does.
    """
    of_rank = {key: value for key, value in os.environ.items() if key.startswith(NOT_OURS) and errors}
    if errors:
        error_file = errors / "attempt_0" / str(world.rank) / "error.json"
        error_file.parent.mkdir(parents=True)
        of_rank |= {"TORCHELASTIC_RUN_ID": "warm", "TORCHELASTIC_ERROR_FILE": str(error_file)}
    _become(cwd, of_rank | env, out, err)
    _fork_from(server)
    if "-m" in program[1:] and not cold_jobs:
        from support import forked_jobs  # noqa: F401  late: it imports the launcher of sweeps
    if encoding := env.get("PYTHONIOENCODING"):
        for stream in (sys.stdout, sys.stderr):
            assert isinstance(stream, io.TextIOWrapper)
            stream.reconfigure(encoding=encoding, errors="strict")
    began = time.process_time()
    code = _run(program)
    sys.stdout.flush()
    sys.stderr.flush()
    if code and world.size > 1:
        sys.exit(code)
    return code, time.process_time() - began


def _become(cwd: Path, env: dict[str, str], out: str, err: str) -> None:
    for path, number in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)


def _server() -> dict[str, object]:
    """How the server that ranks are forked from is reached (multiprocessing keeps that to itself; Python 3.11 to 3.14)."""
    known = vars(forkserver._forkserver)
    return {name: known[name] for name in ("_forkserver_address", "_forkserver_authkey") if name in known}


def _fork_from(server: dict[str, object]) -> None:
    """Use that server in this process too, in the place of one of its own, which would import torch and warm up again."""
    vars(forkserver._forkserver).update(server, ensure_running=lambda: None)
    forkserver.ensure_running = lambda: None


def _run(program: list[str]) -> int:
    """A script or a module as `__main__`."""
    warnings.resetwarnings()
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    try:
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = program
            sys.path.insert(0, str(Path(program[0]).parent))
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def execute_agent(ranks: Ranks, words: Sequence[str], cwd: Path, env: dict[str, str]) -> Done:
    """`torchrun WORDS`, its agent in such a fork, and its ranks in processes of their own."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        (code,) = ranks.run(1, _as_agent, list(words), cwd, env, out.name, err.name)
        return Done(code, out.read(), err.read(), 0.0)


def _as_agent(world: World, words: list[str], cwd: Path, env: dict[str, str], out: str, err: str) -> int:
    """The exit code of an agent, which may end in the midst of all: it is a fork of this process.

    torch has asked for its entry points in the server, so that ours is called here.
    """

    def agent() -> None:
        from torch.distributed.run import main  # late: with torch, which few of those who import this need

        _become(cwd, env, out, err)
        sys.argv = ["torchrun", *words]
        handler()
        try:
            main()
        except Exception as fault:
            sys.excepthook(type(fault), fault, fault.__traceback__)
            sys.exit(1)

    return processes.ended(processes.forked(agent))


def _children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def installed(folder: Path) -> dict[str, str]:
    """The environment in which torchrun finds our entry point, as it does where the package is installed."""
    record = folder / "here-0.dist-info"
    record.mkdir(parents=True, exist_ok=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: here\nVersion: 0\n")
    (record / "entry_points.txt").write_text("[torchrun.handlers]\nhere = tpresearch.agent:handler\n")
    return on_path(folder)


def on_path(folder: Path) -> dict[str, str]:
    """The environment in which modules in `folder` can be imported."""
    return {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
