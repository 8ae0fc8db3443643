"""The default process group of a job: gloo or NCCL, also for one rank; or a fake one, as one rank of many."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore

from tpresearch.config.errors import ConfigError, RunFailed
from tpresearch.config.other_hosts import MET_KEY, check_notice, note_meeting, stopped_key
from tpresearch.config.world import World, agent_store
from tpresearch.parallel.device import Device, keep_freed_memory

log = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=10)
JOIN_S, LOG_JOIN_AFTER_S = 2 * 60 * 60, 30
"""How long rank 0 waits for ranks that may be on hosts with data to prepare still, and after which time it says so."""
REJOIN_S, STOPPED_S = 2 * TIMEOUT.seconds, 2 * 60
"""How long for one that has been there before, and may be in a collective until that times out; and for one that a signal has stopped."""
ABORT_S = 10
LET_GO_S = 0.05
POLL_S = 0.05
"""Seconds between polls. A wait at the store would log a warning each time it ends without an answer."""
ANNOUNCE_KEY, ANSWER_KEY = "tpresearch/here", "tpresearch/answer"
NOTHING_LEFT = "nothing"
"""What ranks would communicate by that find their run complete."""


@contextmanager
def process_group(device: Device, world: World, check: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Context in which the ranks of this job can communicate.

    Args:
        check: called while this rank waits for the others; raises an exception to end that.
    """
    options: dict[str, Any] = {"device_id": device.torch} if device.backend == "nccl" else {}
    if world.size == 1 and not world.elastic:
        options["store"] = dist.HashStore()
    elif device.backend == "fake":  # whose collectives return at once and send nothing
        from torch.testing._internal.distributed.fake_pg import FakeStore  # private; torch 2.11 to 2.14

        options["store"] = FakeStore()
    elif (agent := agent_store()) is not None:
        options["store"] = fresh_store(
            TCPStore(*agent, is_master=False, timeout=TIMEOUT), world, device.backend, check
        )
    if "store" in options:
        options |= {"rank": world.rank, "world_size": world.size}
    if device.shared:
        _share_device(world)
    if device.type == "cuda":
        torch.cuda.set_device(device.torch)
        torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions alone, in float32
    if device.backend == "gloo":
        keep_freed_memory()  # before it starts threads
        atexit.unregister(_let_go)
        atexit.register(_let_go)
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


def _let_go() -> None:
    """Leave Python's lock for a moment to gloo's threads, which take it to let go of the tensors that they have sent. One that still
    waits for it when Python ends is ended in a way that ends the process by SIGABRT (Python before 3.14; torch 2.13)."""
    time.sleep(LET_GO_S)


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


def agree_on_nothing_left(world: World, check: Callable[[], object]) -> None:
    """Where the run is complete for this rank: whether it is for the others, which may be on hosts with a disk of their own.

    Raises:
        ConfigError: if it is not, on every rank.
    """
    if world.hosts > 1 and (agent := agent_store()) is not None:
        fresh_store(TCPStore(*agent, is_master=False, timeout=TIMEOUT), world, NOTHING_LEFT, check)


def fresh_store(
    store: TCPStore, world: World, backend: str, check: Callable[[], object] = lambda: None
) -> Store:
    """The part of the agent's store that belongs to this start of the ranks. All ranks call it; it returns once all have.

    torchrun's agent keeps one store over restarts, and its ranks begin there as if it were new (torch 2.13; pytorch issues
    135712, 167288): one that starts before another finds where that one listened before it died, and fails. The restart
    count does not help, since each agent has its own.

    Rank 0 names the part and sends it to each rank that announces itself. Rank 0 deletes announcements of an earlier
    start; live ranks repeat theirs until answered.

    Raises:
        ConfigError: if one was refused; on rank 0, if one would communicate by another backend, for which both would wait.
        RunFailed: if one has ended otherwise; on rank 0, if one does not come.
    """
    if world.rank == 0:
        name = uuid4().hex
        for rank in range(1, world.size):
            store.delete_key(f"{ANNOUNCE_KEY}/{rank}")
        _wait_for_ranks(store, world, check)
        requests = [store.get(f"{ANNOUNCE_KEY}/{rank}").decode() for rank in range(1, world.size)]
        for rank, request in enumerate(requests, 1):
            if (other := request.rpartition(" ")[2]) != backend:
                raise _differ(backend, other, rank)
        store.set(MET_KEY, name)
        for request in requests:
            store.set(f"{ANSWER_KEY}/{request}", name)
        note_meeting(name)
        return PrefixStore(name, store)
    request = f"{uuid4().hex} {backend}"
    while not store.check([f"{ANSWER_KEY}/{request}"]):
        check()
        check_notice(store)
        store.set(f"{ANNOUNCE_KEY}/{world.rank}", request)
        time.sleep(POLL_S)
    name = store.get(f"{ANSWER_KEY}/{request}").decode()
    note_meeting(name)
    return PrefixStore(name, store)


def _differ(mine: str, other: str, rank: int) -> ConfigError:
    if NOTHING_LEFT in (mine, other):
        done, begins = (0, rank) if mine == NOTHING_LEFT else (rank, 0)
        why = f"the run is complete in the folder that rank {done} sees, and not in that of rank {begins}"
        fix: dict[str, object] = {"hydra.run.dir": "VALUE"}
        return ConfigError("resume", "auto", why, "a run folder on a disk that all hosts share", fix)
    why = f"rank 0 would communicate by {mine}, and rank {rank} by {other}"
    return ConfigError("device", "auto", why, "a GPU for each rank, or device=cpu for all of them")


def _wait_for_ranks(store: Store, world: World, check: Callable[[], object]) -> None:
    began, logs, again = time.monotonic(), True, store.check([MET_KEY])
    for rank in range(1, world.size):
        stopped = store.check([stopped_key(rank)])
        limit_s = STOPPED_S if stopped else REJOIN_S if again else JOIN_S
        while not store.check([f"{ANNOUNCE_KEY}/{rank}"]):
            check()
            check_notice(store)
            waited = time.monotonic() - began
            if waited > limit_s:
                raise RunFailed(_missing(rank, limit_s, again, stopped))
            if logs and waited > LOG_JOIN_AFTER_S:
                may = "torchrun may have ended" if again else "host may be preparing data"
                log.info("waiting for rank %d of %d, whose %s", rank, world.size, may)
                logs = False
            time.sleep(POLL_S)
        store.delete_key(stopped_key(rank))


def _missing(rank: int, waited_s: float, again: bool, stopped: bool) -> str:
    said = f"rank {rank} did not come in {waited_s / 60:g} minutes"
    if not again:
        return f"{said}; to prepare data ahead: python -m tpresearch.prepare with the same overrides, on each host"
    ended = "a signal has stopped it, and its torchrun" if stopped else "its torchrun may have ended"
    return f"{said}: {ended}; the same command on all hosts resumes the run"
