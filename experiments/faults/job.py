"""A run of a few steps on forked ranks, broken at a named point, as torchrun would see it die."""

from __future__ import annotations

import errno
import multiprocessing as mp
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from support.composed import config
from torch.distributed import TCPStore

from tpresearch.checkpoint import faults
from tpresearch.config.errors import ConfigError
from tpresearch.config.world import World
from tpresearch.launch import Run
from tpresearch.launch.stop import Stopped
from tpresearch.train import main
from tpresearch.train.observe import Observer
from tpresearch.train.preflight import check_folder, preflight
from tpresearch.train.state import TrainState
from tpresearch.verify.ranks import exit_with_caller, processor_s

STEPS, EVERY, KEEP = 6, 2, 2
JOB = (
    "model=llama2_debug",
    "data=random_tokens",
    "train.dtype=float64",
    "train.clip_grad_norm=0.2",
    "schedule.warmup_steps=2",
    f"train.steps={STEPS}",
    f"checkpoint.every={EVERY}",
    f"checkpoint.keep={KEEP}",
)
CELLS: dict[str, tuple[int, list[str]]] = {
    "none": (1, []),
    "ddp": (2, []),
    "tp": (2, []),
    "sp": (2, []),
    "fsdp": (2, []),
    "fsdp_tp": (4, ["mesh.tp=2"]),
    "hsdp": (4, ["mesh.dp_shard=2"]),
}
"""Plans, on how many ranks."""
IN_STEPS = ("step", "forward", "backward", "optimizer", "logged")
IN_SAVES = ("made", "writing", "filed", "metadata", "written", "settled", "marked", "renamed", "pruning")
IN_LOADS = ("verified", "loaded")
"""Points at which a run can be broken: between two collectives of a step, while it saves, while it loads."""
TIMEOUT_S = 60
"""Without any processor time: then a rank hangs."""
HUNG = "hung"

_FORKS = mp.get_context("forkserver")
_FORKS.set_forkserver_preload(["tpresearch.verify.warm"])


@dataclass(frozen=True)
class Fault:
    point: str
    nth: int
    """How many times the point is passed before."""
    kind: str
    """kill: SIGKILL of one rank. kill_all: of all at once. full: no space left. error: an exception. term: SIGTERM."""
    rank: int

    def __str__(self) -> str:
        return f"{self.kind} of rank {self.rank} at {self.point} {self.nth}"


class Breaks(Observer):
    """Passes the points of a step."""

    @contextmanager
    def step(self, state: TrainState) -> Iterator[None]:
        faults.fault_point("step")
        yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if name == "pause":
            faults.fault_point("logged")
        yield
        if name in IN_STEPS:
            faults.fault_point(name)


def start(cell: str, folder: Path, fault: Fault | None = None, *more: str) -> list[int | str]:
    """Run the job in a folder until its ranks have ended; their exit codes, `hung` for one that did nothing for long.

    Where a rank dies, the others are sent SIGTERM, as torchrun does, and SIGKILL where they hang.
    """
    size, mesh = CELLS[cell]
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    overrides = [*JOB, f"parallel={cell}", *mesh, *more]
    ranks = [
        _FORKS.Process(
            target=_rank, args=(World(r, size, r, size, True), store.port, overrides, folder, fault)
        )
        for r in range(size)
    ]
    for rank in ranks:
        rank.start()
    return _ended(ranks, fault)


def _ended(ranks: Sequence[BaseProcess], fault: Fault | None) -> list[int | str]:
    told, stuck_since, used = False, time.monotonic(), 0.0
    while any(rank.is_alive() for rank in ranks):
        time.sleep(0.01)
        dead = [rank for rank in ranks if not rank.is_alive() and rank.exitcode not in (0, 143)]
        if dead and not told:
            told = True
            number = signal.SIGKILL if fault and fault.kind == "kill_all" else signal.SIGTERM
            for rank in ranks:
                if rank.is_alive() and rank.pid:
                    os.kill(rank.pid, number)
        now = sum(processor_s(rank) for rank in ranks)
        if now > used + 0.05:
            used, stuck_since = now, time.monotonic()
        if time.monotonic() - stuck_since > TIMEOUT_S:
            stuck = [rank for rank in ranks if rank.is_alive()]
            for rank in stuck:
                rank.kill()
            for rank in ranks:
                rank.join()
            return [HUNG if rank in stuck else rank.exitcode or 0 for rank in ranks]
    return [rank.exitcode or 0 for rank in ranks]


def _rank(world: World, port: int, overrides: list[str], folder: Path, fault: Fault | None) -> None:
    threading.Thread(target=exit_with_caller, daemon=True).start()
    os.environ |= world.environment(port)
    said = (folder.parent / f"{folder.name}.rank{world.rank}.txt").open("a")
    os.dup2(said.fileno(), 1)
    os.dup2(said.fileno(), 2)
    if fault and fault.rank % world.size == world.rank:
        _arm(fault)
    os._exit(_train(world, overrides, folder))


def _train(world: World, overrides: list[str], folder: Path) -> int:
    try:
        job = preflight(config(*overrides), world)
        check_folder(job, folder, False)
        main.train(job, Run(folder, world), [Breaks()])
    except Stopped as stopped:
        return int(stopped.code or 0)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1
    return 0


def _arm(fault: Fault) -> None:
    passed = 0

    def armed(name: str) -> None:
        nonlocal passed
        if name != fault.point:
            return
        passed += 1
        if passed != fault.nth + 1:
            return
        if fault.kind in ("kill", "kill_all"):
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if fault.kind == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if fault.kind == "error":
            raise RuntimeError("broken on purpose")

    faults.armed = armed
