"""Rank 0 of any number of fake ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.config.axes import MeshSizes
from tpresearch.config.world import World
from tpresearch.parallel.device import Device
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh

FAKE = Device(torch.device("cpu"), "fake", "cpu")
"""Tensors are fake ones of the CPU: a build of torch without CUDA has no autograd for others."""


@contextmanager
def fake_mesh(sizes: MeshSizes) -> Iterator[DeviceMesh]:
    """The mesh, within a process group whose collectives return at once and send nothing."""
    with process_group(FAKE, World(size=sizes.world, local_size=sizes.world)), _without_other_ranks():
        yield build_mesh(sizes, FAKE.type)


@contextmanager
def _without_other_ranks() -> Iterator[None]:
    """Inside it, torch creates no process groups of other ranks, and all ranks without rows of a parameter share one empty
    FSDP shard: otherwise 65,536 ranks take a minute, where 8 take a second.

    (`new_group` as DeviceMesh calls it, `_chunk_with_empty` as FSDP does: private, torch 2.11 to 2.14.)
    """
    from torch.distributed import device_mesh
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    new_group = device_mesh.new_group

    def own_group(ranks: list[int], **how: Any) -> Any:
        return new_group(ranks=ranks, **how) if 0 in ranks else None

    def shards(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
        full = torch.chunk(tensor, count, dim=dim)
        return [*full, *[full[0].new_empty(0)] * (count - len(full))]

    with (
        patch.object(device_mesh, "new_group", own_group),
        patch.object(_fsdp_param, "_chunk_with_empty", shards),
    ):
        yield
