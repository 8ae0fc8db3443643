"""Rank 0 of any number of fake ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.config.axes import MeshSizes
from tpresearch.config.world import World
from tpresearch.parallel.device import FAKE
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh

AXES_OF_A_MESH = ("_layout", "_device_type", "_mesh_dim_names", "_thread_id")
_entered: list[tuple[MeshSizes, DeviceMesh]] = []
"""The mesh that is entered now."""


@contextmanager
def fake_mesh(sizes: MeshSizes) -> Iterator[DeviceMesh]:
    """The mesh, within a process group whose collectives return at once and send nothing.

    Entered again inside, for the same sizes, it is the same mesh: what DTensor has found for an op then holds for the next
    recording, and meshes need not be compared rank by rank.
    """
    if _entered and _entered[0][0] == sizes:
        yield _entered[0][1]
        return
    with process_group(FAKE, World(size=sizes.world, local_size=sizes.world)), _without_other_ranks():
        _entered.append((sizes, build_mesh(sizes, FAKE.type)))
        try:
            yield _entered[0][1]
        finally:
            _entered.clear()


@contextmanager
def _without_other_ranks() -> Iterator[None]:
    """Inside it, torch creates no process groups and no FSDP shards of other ranks, and compares meshes of one root
    without their lists of ranks: otherwise 65,536 ranks take a minute, where 8 take a second.

    (`new_group` as DeviceMesh calls it, `_chunk_with_empty` as FSDP does, what `DeviceMesh.__eq__` compares: private, torch 2.11
    to 2.14.)
    """
    from torch.distributed import device_mesh
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    new_group, is_equal = device_mesh.new_group, DeviceMesh.__eq__

    def own_group(ranks: list[int], **how: Any) -> Any:
        return new_group(ranks=ranks, **how) if 0 in ranks else None

    def shards(tensor: Tensor, count: int, dim: int) -> list[Tensor]:
        own = tensor.narrow(dim, 0, -(-tensor.shape[dim] // count))
        return [own, *[own.new_empty(0)] * (count - 1)]

    def has_equal_axes(mesh: Any, other: Any) -> bool:
        ranks = getattr(mesh, "_rank_map", None)
        if ranks is None or getattr(other, "_rank_map", None) is not ranks:
            return is_equal(mesh, other)
        return all(getattr(mesh, name) == getattr(other, name) for name in AXES_OF_A_MESH)

    with (
        patch.object(device_mesh, "new_group", own_group),
        patch.object(DeviceMesh, "__eq__", has_equal_axes),
        patch.object(_fsdp_param, "_chunk_with_empty", shards),
    ):
        yield
