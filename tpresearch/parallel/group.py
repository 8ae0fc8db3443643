"""The default process group of a job: gloo or NCCL, of one rank too; or a fake one, of one rank among many."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from tpresearch.config.world import World
from tpresearch.parallel.device import Device
from tpresearch.parallel.meeting import agent_store, fresh_store


@contextmanager
def process_group(device: Device, world: World) -> Iterator[None]:
    """Inside it, the ranks of this job can talk to each other."""
    where: dict[str, Any] = {"device_id": device.torch} if device.backend == "nccl" else {}
    if world.size == 1 and not world.elastic:
        where |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif device.backend == "fake":
        where |= {"store": _fake_store(), "rank": world.rank, "world_size": world.size}
    elif (agents := agent_store()) is not None:
        where |= {"store": fresh_store(agents, world), "rank": world.rank, "world_size": world.size}
    if device.shared:
        _share_device(world)
    if device.type == "cuda":
        torch.cuda.set_device(device.torch)
    dist.init_process_group(device.backend, timeout=timedelta(minutes=10), **where)
    try:
        yield
    except BaseException:
        # NCCL's end waits for ranks that may be waiting for this one: let it exit.
        if device.backend != "nccl":
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _share_device(world: World) -> None:
    """Let NCCL have several ranks on one device, by calling each a host of its own; they talk through sockets then.

    A collective takes 20 to 40 ms: ranks wait in kernels, and the device goes round among processes (H200, NCCL 2.28).
    Gloo is no way out: its functional all-gather of CUDA tensors crashes (torch 2.11).
    """
    os.environ["NCCL_HOSTID"] = f"rank {world.rank}"
    if world.size == world.local_size:
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")


def _fake_store() -> Any:
    """For backend "fake", whose collectives return at once and move nothing (torch.testing, private; 2.11 and 2.13)."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    return FakeStore()
