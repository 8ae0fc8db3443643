"""How long a collective takes: ring algorithms over links of a host and between hosts, by NCCL's protocols.

A ring of n ranks passes its bytes in n - 1 steps (twice for an all-reduce), each with a latency; a tree all-reduces in
2 log2(n) steps. NCCL chooses the protocol: LL and LL128 trade bandwidth for latency (its src/graph/tuning.cc, whose
constants torch repeats in torch/_inductor/comm_analysis.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tpresearch.config.axes import AXES, MeshSizes
from tpresearch.simulate.cluster import Cluster


@dataclass(frozen=True)
class Protocol:
    """One of NCCL's protocols, with the assumptions of its tuning."""

    bandwidth: float
    """Share of the link's bandwidth."""
    step: float
    """Latency of a step, as a share of the Simple protocol's."""


PROTOCOLS = (Protocol(1.0, 1.0), Protocol(0.92, 0.5), Protocol(0.4, 0.2))
"""Simple, LL128 and LL."""


@dataclass(frozen=True)
class Route:
    """A group of ranks on the cluster."""

    ranks: int
    per_host: int
    """Ranks of the group on one host."""

    @property
    def hosts(self) -> int:
        return -(-self.ranks // self.per_host)


def route(axis: str, sizes: MeshSizes, cluster: Cluster) -> Route:
    """Placement of the ranks along an axis: ranks of the last axis are adjacent, other axes have a stride.

    If groups do not fit hosts evenly, such as every three neighbours on hosts of eight, it is the group that is split
    most, since all others wait for it.
    """
    if axis not in sizes:
        return Route(sizes.world, min(sizes.world, cluster.devices_per_host))
    names = [a.name for a in AXES]
    stride = math.prod(sizes[name] for name in names[names.index(axis) + 1 :])
    devices, span = cluster.devices_per_host, stride * sizes[axis]
    if sizes.world > devices and span % devices and devices % span:
        devices = math.gcd(span, devices)
    return Route(sizes[axis], max(1, min(sizes[axis], devices // stride)))


def collective_s(collective: str, tensor_bytes: int, where: Route, cluster: Cluster) -> float:
    """Seconds of one collective on a whole tensor of this size, alone on its links."""
    if where.ranks <= 1:
        return 0.0
    by_backend = _gloo_s if cluster.is_cpu else _nccl_s
    return cluster["collective_us"] * 1e-6 + by_backend(collective, tensor_bytes, where, cluster)


def _nccl_s(collective: str, tensor_bytes: int, where: Route, cluster: Cluster) -> float:
    """By its fastest protocol, in a ring or, for an all-reduce between hosts, in a tree."""
    inside_step, outside_step = cluster["intra_step_us"] * 1e-6, cluster["inter_step_us"] * 1e-6
    outside = where.hosts - 1
    around = (where.ranks - 1 - outside) * inside_step + outside * outside_step
    latencies = [ring_passes(collective, by_gloo=False) * around]
    if collective == "all_reduce" and outside:
        inside = 2 * (where.per_host - 1) * inside_step
        latencies.append(inside + 2 * math.log2(where.hosts) * outside_step)
    moved, bandwidth = _moved_bytes(collective, tensor_bytes, where, cluster), _bandwidth(where, cluster)
    return min(
        latency * protocol.step + moved / (bandwidth * protocol.bandwidth)
        for latency in latencies
        for protocol in PROTOCOLS
    )


def _gloo_s(collective: str, tensor_bytes: int, where: Route, cluster: Cluster) -> float:
    """In a ring, which is all it has; each step wakes the threads of its ranks."""
    steps = ring_passes(collective, by_gloo=True) * (where.ranks - 1)
    moving = _moved_bytes(collective, tensor_bytes, where, cluster) / _bandwidth(where, cluster)
    copying = cluster["bandwidth_gb_s"] * cluster["copy_efficiency"] * 1e9
    around = steps * (cluster["intra_step_us"] * 1e-6) + moving
    return around + copied_by_gloo(collective, tensor_bytes) / copying


def network_s(collective: str, tensor_bytes: int, where: Route, cluster: Cluster) -> float:
    """Of these seconds, those in which the bytes are on the links between hosts."""
    if where.hosts == 1:
        return 0.0
    return _moved_bytes(collective, tensor_bytes, where, cluster) / _bandwidth(where, cluster)


def _moved_bytes(collective: str, tensor_bytes: int, where: Route, cluster: Cluster) -> float:
    """Bytes that each rank sends around a ring."""
    return ring_passes(collective, cluster.is_cpu) * tensor_bytes * (where.ranks - 1) / where.ranks


def sent_s(core_s: float, network_s: float) -> float:
    """Seconds of a collective of gloo with so much work of its ranks' threads and so much time on the links between hosts. Two
    messages are under way at a time, so that one is worked on while the other is sent."""
    return max(core_s, network_s) + min(core_s, network_s) / 2


def ring_passes(collective: str, by_gloo: bool) -> int:
    """Number of passes of the tensor around a ring. gloo's reduce-scatter is an all-reduce of which each rank keeps its part (torch's
    ProcessGroupGloo.cpp)."""
    return 2 if collective == "all_reduce" or (by_gloo and collective == "reduce_scatter") else 1


def copied_by_gloo(collective: str, tensor_bytes: int) -> int:
    """Bytes that a rank reads and writes besides: a gather is copied out of gloo's buffers, what is scattered into them (torch's
    ProcessGroupGloo.cpp)."""
    return 0 if collective == "all_reduce" else 2 * tensor_bytes


def _bandwidth(where: Route, cluster: Cluster) -> float:
    """Bytes per second of a ring: each rank of a host has a link of its own, and rings are laid through all of them."""
    inside = _intra_host_bandwidth(where, cluster)
    if where.hosts == 1:
        return inside
    links = where.per_host * cluster["inter_gb_s"] * cluster["inter_efficiency"] * 1e9
    return min(inside, links) if where.per_host > 1 else links


def _intra_host_bandwidth(where: Route, cluster: Cluster) -> float:
    """Bytes per second between the ranks of a group on one host."""
    whole = cluster["intra_gb_s"] * 1e9
    if cluster.has_switch or cluster.devices_per_host < 2:
        return whole
    return whole * max(1, where.per_host - 1) / (cluster.devices_per_host - 1)
