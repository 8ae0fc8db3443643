"""From the ledger of one rank to the bytes that cross between two hosts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from tpresearch.config.axes import AXIS_NAMES
from tpresearch.ledger.entries import Entry

GLOO_FACTOR = {"all_gather": 1, "all_reduce": 1, "reduce_scatter": 2}
"""Bytes that gloo sends for each byte of the ring formulas.

Its all-gather (gloo/allgather.cc) and all-reduce (`ring` in gloo/allreduce.cc) are rings. torch builds a
reduce-scatter from an all-reduce of a copy and keeps one part of it (`reduce_scatter_tensor_coalesced` in
torch/csrc/distributed/c10d/ProcessGroupGloo.cpp). `collectives.py` measures all three.
"""


def crossing_hops(mesh: dict[str, int], host_of_rank: Sequence[str]) -> dict[str, int]:
    """Ring hops of each mesh axis that lead from one host to the other, counted in one direction.

    A ring passes ranks in the order of their axis and closes behind the last. It comes back to the host where it
    began, so it crosses as often one way as the other, whichever way round it turns.

    Args:
        mesh: ranks along each axis, as in summary.json.
        host_of_rank: on two hosts.
    """
    sizes = [mesh.get(axis, 1) for axis in AXIS_NAMES]
    ranks = np.arange(len(host_of_rank)).reshape(sizes)
    hops = {}
    for index, axis in enumerate(AXIS_NAMES):
        groups = np.moveaxis(ranks, index, -1).reshape(-1, sizes[index])
        rings = ((group, np.roll(group, -1)) for group in groups)
        crossing = sum(
            host_of_rank[a] != host_of_rank[b] for ring in rings for a, b in zip(*ring, strict=True)
        )
        hops[axis] = crossing // 2
    return hops


def ring_bytes_each_way(entries: Iterable[Entry], hops: dict[str, int]) -> int:
    """Bytes from one host to the other by the ring formulas. Every hop carries what rank 0 sends."""
    return sum(entry.sent_bytes * hops[entry.axis] for entry in entries)


def gloo_bytes_each_way(entries: Iterable[Entry], hops: dict[str, int]) -> int:
    """The same by the algorithms that gloo uses."""
    return sum(GLOO_FACTOR[entry.collective] * entry.sent_bytes * hops[entry.axis] for entry in entries)
