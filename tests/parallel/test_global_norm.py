"""The norm of gradients that live on different meshes, against the norm of the whole."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tpresearch.config.axes import MeshSizes
from tpresearch.config.world import World
from tpresearch.parallel.device import CPU
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh, data_rank
from tpresearch.parallel.norm import global_norm
from tpresearch.verify.ranks import Ranks


def on_mixed_meshes(world: World) -> tuple[float, int]:
    with process_group(CPU, world):
        mesh = build_mesh(MeshSizes(dp_replicate=2, tp=2), "cpu")
        whole = torch.arange(1.0, 8.0, dtype=torch.float64)
        pieces: list[DTensor] = [
            distribute_tensor(whole, mesh["dp_replicate", "tp"], [Replicate(), Shard(0)]),
            distribute_tensor(whole, mesh["tp"], [Replicate()]),
            distribute_tensor(whole, mesh["dp_replicate"], [Shard(0)]),
        ]
        return global_norm(list(pieces), mesh).item(), data_rank(mesh)


def test_each_part_is_counted_once_on_every_rank(ranks: Ranks) -> None:
    found = ranks.run(4, on_mixed_meshes)
    expected = math.sqrt(3 * sum(n * n for n in range(1, 8)))
    assert [norm for norm, _ in found] == [expected] * 4
    assert [rank for _, rank in found] == [0, 0, 1, 1]


DTYPES = (torch.float32, torch.bfloat16)


def of_large_gradients(world: World) -> list[tuple[float, float, float]]:
    """Of a large and a small gradient: whole, and with the large one, whose last elements count, as two shards; in float64 by torch
    alone."""
    found = []
    with process_group(CPU, world):
        mesh = build_mesh(MeshSizes(dp_shard=2), "cpu")
        drawn = torch.randn(2_000_106, generator=torch.Generator().manual_seed(0))
        drawn[:1_999_906] *= 1e-3
        for dtype in DTYPES:
            whole, small = drawn.to(dtype).split([2_000_006, 100])
            shards = distribute_tensor(whole, mesh["dp_shard"], [Shard(0)])
            alone, together = (global_norm([each, small], mesh).item() for each in (whole, shards))
            found.append((alone, together, torch.cat([whole, small]).double().norm().item()))
    return found


def test_large_gradients_have_their_norm_to_the_last_digits_of_a_float32(ranks: Ranks) -> None:
    """Else one process, whose parts are longer, would have another norm than a plan, and clip otherwise."""
    found, _ = ranks.run(2, of_large_gradients)
    for dtype, (whole, shards, exact) in zip(DTYPES, found, strict=True):
        assert whole == pytest.approx(exact, rel=1e-7), dtype
        assert shards == pytest.approx(exact, rel=1e-7), dtype
