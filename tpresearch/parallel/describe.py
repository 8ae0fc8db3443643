"""Descriptions of a mesh and of a sharded model for a run's log."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate

from tpresearch.config.axes import AXIS_NAMES, MeshSizes
from tpresearch.plan.describe import Row, folded


def describe_mesh(sizes: MeshSizes, device: str) -> str:
    """The mesh of the axes that have more than one rank, as torch prints one with its ranks written out."""
    shown = sizes.nontrivial() or {AXIS_NAMES[-1]: 1}
    ranks = torch.arange(sizes.world).view(*shown.values()).tolist()
    return f"DeviceMesh('{device}', {ranks}, mesh_dim_names={tuple(shown)})"


def describe_model(model: nn.Module) -> str:
    """Each parameter of the sharded model: its placements, and its local and global shape.

    Llama2
      layers.{0-1}.attention.wq.weight  dp_shard: Shard(0), tp: Shard(0)  64x256 of 256x256
    """
    rows = folded(
        Row(name, "", _placements(p), tuple(_local(p).shape), "x".join(map(str, p.shape)) or "scalar")
        for name, p in model.named_parameters()
    )
    cells = [
        (row.fqn, row.placement, "x".join(map(str, row.local_shape or ())) or "scalar", row.collectives)
        for row in rows
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(2)]
    lines = [
        f"  {name:<{widths[0]}}  {placed:<{widths[1]}}  {local}" + f" of {whole}" * (local != whole)
        for name, placed, local, whole in cells
    ]
    return "\n".join([type(model).__name__.removeprefix("FSDP"), *lines])


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _placements(parameter: torch.Tensor) -> str:
    """Over the axes of several ranks on which it is not the same."""
    if not isinstance(parameter, DTensor):
        return "replicated"
    mesh = parameter.device_mesh
    over = zip(mesh.mesh_dim_names or (), mesh.shape, parameter.placements, strict=True)
    found = [
        f"{name}: Shard({getattr(placement, 'dim', '?')})"
        for name, size, placement in over
        if size > 1 and not isinstance(placement, Replicate)
    ]
    return ", ".join(found) or "replicated"
