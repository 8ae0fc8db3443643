"""The default process group of a job: gloo or NCCL, also for one rank; or a fake one, as one rank of many."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from tpresearch.config.errors import ConfigError, RunFailed
from tpresearch.config.other_hosts import check_notice
from tpresearch.config.world import World, agent_store
from tpresearch.parallel.device import Device

log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)
JOIN_S, LOG_JOIN_AFTER_S = 2 * 60 * 60, 30
"""How long rank 0 waits for ranks that may be on hosts with data to prepare still, and after which time it says so."""
ABORT_S = 10
POLL_S = 0.05
"""Seconds between polls. A wait at the store would log a warning each time it ends without an answer."""
ANNOUNCE_KEY, ANSWER_KEY = "tpresearch/here", "tpresearch/answer"


class RankMissing(RunFailed):
    """A rank did not come; the message says which."""


@contextmanager
def process_group(device: Device, world: World) -> Iterator[None]:
    """Context in which the ranks of this job can communicate."""
    options: dict[str, Any] = {"device_id": device.torch} if device.backend == "nccl" else {}
    if world.size == 1 and not world.elastic:
        options["store"] = dist.HashStore()
    elif device.backend == "fake":  # whose collectives return at once and send nothing
        from torch.testing._internal.distributed.fake_pg import FakeStore  # private; torch 2.11 to 2.14

        options["store"] = FakeStore()
    elif (agent := agent_store()) is not None:
        options["store"] = fresh_store(
            TCPStore(*agent, is_master=False, timeout=TIMEOUT), world, device.backend
        )
    if "store" in options:
        options |= {"rank": world.rank, "world_size": world.size}
    if device.shared:
        _share_device(world)
    if device.type == "cuda":
        torch.cuda.set_device(device.torch)
    print_exception = sys.excepthook
    dist.init_process_group(device.backend, timeout=TIMEOUT, **options)
    if not world.elastic:
        # Torch would begin each line of a traceback with [rank0], and again with each further group.
        sys.excepthook = print_exception
    try:
        yield
    except BaseException:
        # NCCL's orderly end waits for ranks that may be waiting for this one.
        if device.backend == "nccl":
            abort_group()
        else:
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def abort_group() -> None:
    """End all groups of this process at once; kernels that wait for another rank return, with no meaningful result.

    Without it, C++ warns at the end of a failed process. (torch's own advice there, though private; run on torch 2.11 and
    2.14. It aborts NCCL, which may be stuck itself: after ABORT_S the process may end without it.)
    """

    def abort() -> None:
        with suppress(Exception):
            dist.distributed_c10d._abort_process_group()

    if dist.is_initialized():
        thread = threading.Thread(target=abort, name="abort", daemon=True)
        thread.start()
        thread.join(ABORT_S)


def _share_device(world: World) -> None:
    """Let NCCL run several ranks on one device, by declaring each a separate host; they then communicate over sockets.

    A collective takes 20 to 40 ms: ranks wait in kernels, and the device goes round among processes (H200, NCCL 2.28).
    Gloo is not an alternative: its functional all-gather of CUDA tensors crashes (torch 2.11).
    """
    os.environ["NCCL_HOSTID"] = f"rank {world.rank}"
    if world.size == world.local_size:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def fresh_store(store: TCPStore, world: World, backend: str) -> Store:
    """The part of the agent's store that belongs to this start of the ranks. All ranks call it; it returns once all have.

    torchrun's agent keeps one store over restarts, and its ranks begin there as if it were new (torch 2.13; pytorch issues
    135712, 167288): one that starts before another finds where that one listened before it died, and fails. The restart
    count does not help, since each agent has its own.

    Rank 0 names the part and sends it to each rank that announces itself. Rank 0 deletes announcements of an earlier
    start; live ranks repeat theirs until answered.

    Raises:
        RankMissing: on rank 0, if a rank does not come.
        ConfigError: if one was refused; on rank 0, if one would communicate by another backend, for which both would wait.
        RunFailed: if one has ended otherwise.
    """
    if world.rank == 0:
        name = uuid4().hex
        for rank in range(1, world.size):
            store.delete_key(f"{ANNOUNCE_KEY}/{rank}")
        _wait_for_ranks(store, world)
        requests = [store.get(f"{ANNOUNCE_KEY}/{rank}").decode() for rank in range(1, world.size)]
        for rank, request in enumerate(requests, 1):
            if (other := request.rpartition(" ")[2]) != backend:
                why = f"rank 0 would communicate by {backend}, and rank {rank} by {other}"
                raise ConfigError("device", "auto", why, "a GPU for each rank, or device=cpu for all of them")
        for request in requests:
            store.set(f"{ANSWER_KEY}/{request}", name)
        return PrefixStore(name, store)
    request = f"{uuid4().hex} {backend}"
    while not store.check([f"{ANSWER_KEY}/{request}"]):
        check_notice(store)
        store.set(f"{ANNOUNCE_KEY}/{world.rank}", request)
        time.sleep(POLL_S)
    return PrefixStore(store.get(f"{ANSWER_KEY}/{request}").decode(), store)


def _wait_for_ranks(store: Store, world: World) -> None:
    began, logs = time.monotonic(), True
    for rank in range(1, world.size):
        while not store.check([f"{ANNOUNCE_KEY}/{rank}"]):
            check_notice(store)
            waited = time.monotonic() - began
            if waited > JOIN_S:
                ahead = "python -m tpresearch.prepare with the same overrides, on each host"
                why = f"rank {rank} did not come in {JOIN_S / 3600:g} hours"
                raise RankMissing(f"{why}; to prepare data ahead: {ahead}")
            if logs and waited > LOG_JOIN_AFTER_S:
                log.info("waiting for rank %d of %d, whose host may be preparing data", rank, world.size)
                logs = False
            time.sleep(POLL_S)
