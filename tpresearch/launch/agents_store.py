"""The store of torchrun's agents, through which ranks agree before a process group exists, and tell those of other hosts that they end."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from tpresearch.config.other_hosts import begun_key, check_notice, notice_key, notice_of, stopped_key
from tpresearch.config.world import World, WrongEnvironment, agent_store

if TYPE_CHECKING:
    from torch.distributed import TCPStore

TELL_S = 10


def connect(timeout: timedelta) -> TCPStore | None:
    """The store; None without torchrun. Exits if torchrun has ended, or cannot be reached on the host of rank 0."""
    if (where := agent_store()) is None:
        return None
    try:
        socket.create_connection(where, timeout.seconds).close()
    except ConnectionRefusedError:  # it was there before its ranks: killed while this one was importing
        sys.exit(f"torchrun has ended: nothing answers at {where[0]}:{where[1]}")
    except OSError as error:  # its host's name has no address here, or a firewall is before the port
        why = f"the torchrun of rank 0 cannot be reached at {where[0]}:{where[1]} ({error.strerror or error})"
        sys.exit(f"{why}; on its host, torchrun --local-addr=ADDRESS, one that can be reached from here")
    from torch.distributed import TCPStore  # late: it costs two seconds, and no refusal needs it

    return TCPStore(*where, is_master=False, timeout=timeout)


def tell_other_hosts(error: BaseException, world: World) -> None:
    """Tell ranks of other hosts, which may wait for this one, that it ends: their torchrun does not."""
    if world.hosts > 1 or isinstance(error, WrongEnvironment):
        _with_store(lambda store: store.compare_set(notice_key(store), "", notice_of(error)))


def tell_begun() -> None:
    """Tell all ranks of this job that torchrun may start again: from now on the checkpoints in its folder are its own."""
    _with_store(lambda store: store.set(begun_key(), ""))


def tell_stopped(world: World) -> None:
    """Tell those that may be started again, and would wait for this rank, that a signal has stopped it."""
    if world.hosts > 1:
        _with_store(lambda store: store.set(stopped_key(world.rank), ""))


def hear_other_hosts() -> None:
    """End this rank too if one of another host has told that it ends, as `check_notice` does."""
    _with_store(check_notice)


def _with_store(use: Callable[[TCPStore], object]) -> None:
    """Use the store, unless it has ended with the host that it was on."""
    if (where := agent_store()) is None:
        return
    with suppress(OSError):
        socket.create_connection(where, TELL_S).close()
        from torch.distributed import DistError, TCPStore

        with suppress(DistError):
            use(TCPStore(*where, is_master=False, timeout=timedelta(seconds=TELL_S)))
