"""Real gloo ranks on this host, in processes that start once and then take one function after another."""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from tpresearch.config.world import World

TIMEOUT_S = 120


class RankError(Exception):
    """A rank raised; the message is its traceback."""


class Ranks:
    """`run(4, f, *args)` calls `f(world, *args)` on four ranks at once and gives their results in rank order.

    `f` must be a module's own function. It finds the environment that torchrun would give it, and opens and
    closes its own process group. Where a rank raises, hangs or dies, all are ended and later calls start new ones.
    """

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        self._timeout_s = timeout_s
        self._context = mp.get_context("spawn")
        self._workers: list[tuple[Any, Connection]] = []

    def start(self, size: int) -> None:
        """Have this many processes; they import torch while the caller does something else."""
        if not all(process.is_alive() for process, _ in self._workers):
            self.close()
        while len(self._workers) < size:
            self._start_one()

    def run(self, size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        self.start(size)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        connections = [connection for _, connection in self._workers[:size]]
        for rank, connection in enumerate(connections):
            connection.send((rank, size, port, function, args))
        results: dict[int, Any] = {}
        while len(results) < size:
            waiting = [c for rank, c in enumerate(connections) if rank not in results]
            ready = wait(waiting, timeout=self._timeout_s)
            if not ready:
                self.close()
                raise RankError(
                    f"ranks {[connections.index(c) for c in waiting]} hung for {self._timeout_s} s"
                )
            for rank in [rank for rank, connection in enumerate(connections) if connection in ready]:
                try:
                    ok, value = connections[rank].recv()
                except EOFError:
                    ok, value = False, "its process died"
                if not ok:
                    self.close()
                    raise RankError(f"rank {rank} of {size}:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(size)]

    def _start_one(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs,), daemon=True)
        process.start()
        self._workers.append((process, ours))

    def close(self) -> None:
        for process, _ in self._workers:
            process.kill()
        self._workers.clear()


def _serve(connection: Connection) -> None:
    import logging
    import warnings

    import torch

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)
    while True:
        rank, size, port, function, args = connection.recv()
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        try:
            connection.send((True, function(World(rank, size, rank, size, elastic=True), *args)))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        gc.collect()  # process groups end with the model and mesh that hold them, in cycles: ten threads each
