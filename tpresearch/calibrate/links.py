"""Measurements of collectives over this machine's GPUs, or over those of several hosts, in the format that `rows` reads.

Two kinds of group are measured: all ranks of a host, and one rank of each host, of which all groups communicate at once, as
FSDP's do beside tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from tpresearch.calibrate import cuda
from tpresearch.calibrate.rows import ACROSS_HOSTS, IN_A_HOST
from tpresearch.config.world import World
from tpresearch.parallel.device import Device
from tpresearch.parallel.group import process_group
from tpresearch.verify.ranks import RankError, Ranks

LARGE_BYTES, SMALL_BYTES = 2**28, 2**12
"""Sizes of the whole tensor: one that links determine, and one that only latencies do."""


def measure_links(world: World) -> list[dict[str, Any]]:
    """Rows of a job's ranks, all of which call it; a process by itself starts a rank for each GPU. None with one GPU.

    Where they cannot communicate, there is a row with the error: what one GPU tells is measured all the same.
    """
    count = torch.cuda.device_count()
    if world.size > 1:
        return link_rows(world)
    try:
        return Ranks().run(count, link_rows)[0] if count > 1 else []
    except RankError as error:
        row = {"op": "collectives", "shape": [count], "error": str(error).splitlines()[-1]}
        print(f"  {row['op']} of {count} GPUs failed: {row['error']}", flush=True)
        return [row]


def link_rows(world: World, device: Device | None = None) -> list[dict[str, Any]]:
    """Rows of {op, shape, us, flops, bytes}, with the shape (bytes of the whole tensor, ranks of the group); rank 0 prints each.

    Args:
        device: this rank's GPU, unless given.
    """
    index = 0 if world.own_device else world.local_rank
    device = device or Device(torch.device("cuda", index), "nccl", "gpu")
    rows, lead = [], cuda.lead_matrix(device.torch)
    with process_group(device, world):
        for name, group in _groups(world):
            for size in (SMALL_BYTES, LARGE_BYTES):
                for op, call, moved in _collectives(size, group, device.torch):
                    dist.barrier()
                    us = cuda.microseconds(call, lead)
                    row = {"op": f"{op} {name}", "shape": [size, group.size()], "us": us}
                    rows.append(row | {"flops": 0.0, "bytes": moved})
                    if world.rank == 0:
                        print(f"  {op} {name}, {size} bytes, {group.size()} ranks: {us:.1f} us", flush=True)
    return rows


def _groups(world: World) -> Iterator[tuple[str, dist.ProcessGroup]]:
    """This rank's groups of more than one rank. All ranks make all groups, in the same order."""
    in_host = [list(range(i, i + world.local_size)) for i in range(0, world.size, world.local_size)]
    across = [list(range(i, world.size, world.local_size)) for i in range(world.local_size)]
    for name, lists in ((IN_A_HOST, in_host), (ACROSS_HOSTS, across)):
        if len(lists[0]) > 1:
            group, _ = dist.new_subgroups_by_enumeration(lists)
            assert isinstance(group, dist.ProcessGroup)
            yield name, group


def _collectives(
    size: int, group: dist.ProcessGroup, device: torch.device
) -> Iterator[tuple[str, Callable[[], object], float]]:
    """Name, call and bytes that a rank sends around a ring, of a tensor of about `size` bytes."""
    part = max(1, size // 2 // group.size())
    shard = torch.zeros(part, dtype=torch.bfloat16, device=device)
    whole = torch.zeros(part * group.size(), dtype=torch.bfloat16, device=device)
    once = 2.0 * part * (group.size() - 1)
    yield "all_gather", partial(dist.all_gather_into_tensor, whole, shard, group=group), once
    yield "reduce_scatter", partial(dist.reduce_scatter_tensor, shard, whole, group=group), once
    yield "all_reduce", partial(dist.all_reduce, whole, group=group), 2 * once
