"""The device mesh of a job, and sums over its axes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from tpresearch.config.axes import AXES, AXIS_NAMES, DATA_AXES, MeshSizes


def build_mesh(sizes: MeshSizes, device_type: str) -> DeviceMesh:
    """A mesh of all axes, including those of size 1, so that each can be addressed by name."""
    mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=AXIS_NAMES)
    _clear_cache_of_other_meshes(mesh)
    return mesh


_last_mesh: list[object] = []
"""Identifies the last mesh of this process: shape, backend and group names."""


def _clear_cache_of_other_meshes(mesh: DeviceMesh) -> None:
    """Clear DTensor's cache of sharding propagation, which holds meshes: an equal submesh of another mesh would find
    process groups that no longer exist, or those of other ranks under the same names (private; torch 2.11 to 2.14)."""
    names = [mesh.get_group(axis).group_name for axis in AXIS_NAMES]
    this = (mesh.shape, dist.get_backend(), names)
    if _last_mesh and _last_mesh[0] != this:
        _clear_sharding_prop_cache()
    _last_mesh[:] = [this]


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh for `fully_shard`: the axes that split rows, without replicating axes of size 1."""
    used = [a.name for a in AXES if a.splits_rows and (a.shards_state or axis_size(mesh, a.name) > 1)]
    return mesh[tuple(used)]


def data_rank(mesh: DeviceMesh) -> int:
    """Index of the part of the global batch that this rank reads; equal along axes that do not split rows."""
    rank = 0
    for axis in DATA_AXES:
        rank = rank * axis_size(mesh, axis) + mesh.get_local_rank(axis)
    return rank


def axis_size(mesh: DeviceMesh, axis: str) -> int:
    """Ranks along an axis. (`mesh[axis]` builds a mesh each time: milliseconds, in every step.)"""
    assert mesh.mesh_dim_names
    return mesh.size(mesh.mesh_dim_names.index(axis))


def sum_over(mesh: DeviceMesh, values: Tensor, axes: tuple[str, ...]) -> Tensor:
    """Sum `values`, in place, over the ranks along `axes`. Axes of size 1 send nothing."""
    for axis in axes:
        if axis_size(mesh, axis) > 1:
            dist.all_reduce(values, group=mesh.get_group(axis))
    return values


def sum_coalesced(mesh: DeviceMesh, tensors: list[Tensor], axis: str) -> None:
    """Sum tensors of one dtype, in place, over the ranks along one axis, in one all-reduce, in at least float32."""
    flat = torch.cat([t.flatten() for t in tensors])
    wide = torch.promote_types(flat.dtype, torch.float32)
    flat = flat.to(mesh.device_type, wide)  # offloaded ones are on the CPU
    summed = sum_over(mesh, flat, (axis,)).split([t.numel() for t in tensors])
    for tensor, value in zip(tensors, summed, strict=True):
        tensor.copy_(value.view_as(tensor))
