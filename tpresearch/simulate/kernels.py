"""A recorded part of a step as a device runs it: kernels with their times, collectives with their groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tpresearch.config.axes import MeshSizes
from tpresearch.simulate.cluster import Cluster
from tpresearch.simulate.network import collective_s, network_s, route
from tpresearch.simulate.prices import COPIES, bytes_s, fused_bytes, op_s
from tpresearch.simulate.trace import Op


class Kernel(NamedTuple):
    """What one launch puts on the device, or one collective on its group's links."""

    kind: str
    """gemm, attention, elementwise, optimizer, copy, collective, or wait."""
    name: str
    seconds: float
    op: Op
    """The op that it is, or the last of those that are fused in it."""
    network_s: float = 0.0
    """Of ranks on CPUs, how long of it the network takes, which their sharing of cores does not slow down."""


def kernels(ops: Sequence[Op], cluster: Cluster, sizes: MeshSizes, compiled: bool) -> list[Kernel]:
    """Everything that a part of a step launches, in its order.

    Compiled blocks run their elementwise ops in one kernel between two matmuls; the loss and what comes before the first
    matmul of backward lie outside of blocks. A norm that CUDA runs as one kernel is one in eager code too, and on a CPU many.
    """
    last_read = {number: place for place, op in enumerate(ops) for number, _ in op.reads}
    found: list[Kernel] = []
    run: list[Op] = []

    def flush(end: int) -> None:
        if run:
            moved = fused_bytes(run, last_read, end)
            found.append(Kernel("elementwise", run[-1].name, bytes_s(moved, cluster), run[-1]))
            run.clear()

    fuses = False
    for place, op in enumerate(ops):
        is_one = op.fused >= 0 and not cluster.is_host
        joins = op.kind == "other" and op.name not in COPIES and (is_one or fuses)
        if run and not (joins and (fuses or op.fused == run[-1].fused)):
            flush(place - 1)
        if joins:
            run.append(op)
        else:
            found.append(_alone(op, cluster, sizes))
        if op.kind == "gemm":
            fuses = compiled and op.phase in ("forward", "backward")
        elif op.phase == "loss" or (compiled and op.phase == "forward" and op.name == "embedding"):
            fuses = op.phase == "forward"
    flush(len(ops))
    return found


def _alone(op: Op, cluster: Cluster, sizes: MeshSizes) -> Kernel:
    if op.kind == "collective":
        assert op.event
        event = op.event
        what = event.collective, event.tensor_bytes, route(event.axis, sizes, cluster), cluster
        on_network_s = network_s(*what) if cluster.is_host else 0.0
        return Kernel("collective", event.collective, collective_s(*what), op, on_network_s)
    if op.kind == "wait":
        return Kernel("wait", op.name, 0.0, op)
    kind = "copy" if op.name in COPIES else "elementwise" if op.kind == "other" else op.kind
    return Kernel(kind, op.name, op_s(op, cluster), op)
