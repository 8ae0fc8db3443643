"""Real gloo ranks on this host, forked for each job from a warm server."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from tpresearch.config.world import World
from tpresearch.launch.progress_bars import keep_bars_in_process

TIMEOUT_S = 300
IDLE_S = 0.1
"""Processor time that a stuck rank may still spend polling during a whole timeout."""
TELLS_PROCESSOR_TIME = Path("/proc/self/stat").exists()
"""Not on macOS, where ranks are waited for until they end."""

_CONTEXT = mp.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tpresearch.verify.warm"])


class RankError(Exception):
    """A rank raised, died or hung; the message is its traceback, or states this."""


class Ranks:
    """`run(4, f, *args)` calls `f(world, *args)` on four ranks at once and returns their results in rank order.

    `f` must be a module-level function. It finds the environment that torchrun would give it, and opens and
    closes its own process group. Every job has its own processes, which end with it.

    Args:
        timeout_s: how long ranks may neither return nor compute.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s

    def start(self) -> None:
        """Start the server, which imports torch while the caller does something else."""
        forkserver.ensure_running()

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(world, *args)` on each of `size` ranks; the results in rank order.

        Raises:
            RankError: if a rank raises, dies or hangs. All are ended then.
        """
        from torch.distributed import TCPStore  # late: the server imports torch at the same time

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        ranks: list[tuple[BaseProcess, Connection]] = []
        try:
            for rank in range(size):
                world = World(rank, size, rank, size, elastic=True)
                ranks.append(_fork(world, store.port, function, args))
            return self._results(ranks)
        finally:
            for process, _ in ranks:
                process.kill()
            for process, connection in ranks:
                process.join()
                connection.close()

    def _results(self, ranks: list[tuple[BaseProcess, Connection]]) -> list[Any]:
        connections = [connection for _, connection in ranks]
        results: dict[int, Any] = {}
        computed, since = 0.0, time.monotonic()
        while len(results) < len(ranks):
            waiting = [connection for rank, connection in enumerate(connections) if rank not in results]
            for connection in wait(waiting, timeout=min(1, self._timeout_s / 4)):
                rank = connections.index(connection)  # pyrefly: ignore[bad-argument-type]
                results[rank] = _result(rank, connections)
            now = sum(processor_s(process) for process, _ in ranks)
            if now > computed + IDLE_S:
                computed, since = now, time.monotonic()
            elif TELLS_PROCESSOR_TIME and time.monotonic() - since > self._timeout_s:
                stuck = [rank for rank in range(len(ranks)) if rank not in results]
                raise RankError(f"ranks {stuck} hung: they have computed nothing for {self._timeout_s} s")
        return [results[rank] for rank in range(len(ranks))]


def _result(rank: int, connections: list[Connection]) -> Any:
    try:
        ok, value = connections[rank].recv()
    except EOFError:
        ok, value = False, "its process died"
    if not ok:
        raise RankError(f"rank {rank} of {len(connections)}:\n{value}")
    return value


def processor_s(process: BaseProcess) -> float:
    """Processor time of its main thread (gloo's threads poll for ever); 0 of one that has ended."""
    try:
        fields = (
            Path(f"/proc/{process.pid}/task/{process.pid}/stat")
            .read_text(encoding="utf-8")
            .rpartition(")")[2]
            .split()
        )
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _fork(
    world: World, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> tuple[BaseProcess, Connection]:
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_run_rank, args=(theirs, world, port, function, args))
    process.start()
    theirs.close()  # otherwise the end of the pipe is not noticed when the process dies
    return process, ours


def _run_rank(
    connection: Connection, world: World, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the caller, who ends all ranks
    threading.Thread(target=exit_with_caller, daemon=True).start()
    keep_bars_in_process()
    os.environ |= world.environment(port) | {"TORCHELASTIC_RESTART_COUNT": "0"}  # the caller keeps the store
    try:
        answer = (True, function(world, *args))
    except BaseException:
        answer = (False, traceback.format_exc())
    connection.send(answer)
    connection.poll(None)  # others may still talk to this rank: the caller ends all together


def exit_with_caller() -> None:
    """End this process when the one that started it ends, however it does."""
    caller = mp.parent_process()
    assert caller
    caller.join()
    os._exit(1)
