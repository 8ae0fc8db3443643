"""The kernels of a recorded part of a step with their times, and its collectives with their groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tpresearch.config.axes import MeshSizes
from tpresearch.simulate.cluster import Cluster
from tpresearch.simulate.network import collective_s, network_s, route
from tpresearch.simulate.prices import COPIES, bytes_s, fused_bytes, op_s
from tpresearch.simulate.trace import Op, Touched

_CAST_OPS = frozenset(["abs", "max", "amax", "_to_copy", "clamp", "reciprocal", "mul", "contiguous"])
"""Ops of torchao's cast to float8."""
SCALE_BYTES = 8
"""Maximum size of a tensor's scale."""


class Kernel(NamedTuple):
    """What one launch puts on the device, or one collective on its group's links."""

    kind: str
    """gemm, attention, elementwise, optimizer, copy, collective, or wait."""
    name: str
    seconds: float
    op: Op
    """Its op, or the last of the ops that are fused in it."""
    network_s: float = 0.0
    """For ranks on CPUs, the part of it that the network takes, which sharing cores does not slow down."""


def kernels(ops: Sequence[Op], cluster: Cluster, sizes: MeshSizes, compiled: bool) -> list[Kernel]:
    """Everything that a part of a step launches, in its order.

    Compiled blocks run their elementwise ops in one kernel between two matmuls; the loss, of which the recorder tells what is
    compiled, and what comes before the first matmul of backward lie outside of blocks. What was recorded as one kernel, such as a norm of a GPU, is one in eager code too.
    """
    if compiled and any(op.kind == "gemm" and op.element == 1 for op in ops):
        ops = _deduplicate_casts(ops)
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
        joins = op.kind == "other" and op.name not in COPIES and (op.fused >= 0 or fuses)
        if run and not (joins and (fuses or op.fused == run[-1].fused)):
            flush(place - 1)
        if joins:
            run.append(op)
            if fuses and _reduces_to_one(op):
                flush(place)  # what is computed with a tensor's maximum waits for all of the tensor
        else:
            found.append(_single_kernel(op, cluster, sizes))
        if op.kind == "gemm":
            fuses = compiled and op.phase in ("forward", "backward")
        elif op.phase == "loss" or (compiled and op.phase == "forward" and op.name == "embedding"):
            fuses = op.phase == "forward"
    flush(len(ops))
    return found


def _reduces_to_one(op: Op) -> bool:
    return op.name in ("max", "amax") and sum(size for _, size in op.writes) <= op.element


def _deduplicate_casts(ops: Sequence[Op]) -> list[Op]:
    """A part of a compiled step in which no tensor is cast to float8 twice in a phase, and no scale is computed twice.

    Each layer's code casts its own factors, again in backward. A compiler computes equal expressions once, and keeps what
    is small for backward. A cast starts from its tensor's absolute values.
    """
    found: list[Op] = []
    same: dict[int, int] = {}
    """Storage that is not created -> the one that holds the same values."""
    cast: set[int] = set()
    """Storages that are cast, and those that casts make."""
    seen: dict[tuple[object, ...], Touched] = {}
    for op in ops:
        reads = tuple((same.get(number, number), size) for number, size in op.reads)
        numbers = {number for number, _ in reads}
        if op.phase in ("forward", "backward") and (
            op.name == "abs" or (op.name in _CAST_OPS and numbers <= cast)
        ):
            of_scale = op.name == "abs" or sum(size for _, size in op.writes) <= SCALE_BYTES
            key = (
                not of_scale and op.phase,
                op.name,
                op.element,
                reads,
                tuple(size for _, size in op.writes),
            )
            cast |= numbers | {number for number, _ in op.writes}
            if earlier := seen.get(key):
                same |= {ours: theirs for (ours, _), (theirs, _) in zip(op.writes, earlier, strict=True)}
                continue
            seen[key] = op.writes
        found.append(op._replace(reads=reads))
    read = {number for op in found for number, _ in op.reads}
    return [op for op in found if op.name != "abs" or op.writes[0][0] in read]


def _single_kernel(op: Op, cluster: Cluster, sizes: MeshSizes) -> Kernel:
    if op.kind == "collective":
        assert op.event
        event = op.event
        what = event.collective, event.tensor_bytes, route(event.axis, sizes, cluster), cluster
        on_network_s = network_s(*what) if cluster.is_cpu else 0.0
        return Kernel("collective", event.collective, collective_s(*what), op, on_network_s)
    if op.kind == "wait":
        return Kernel("wait", op.name, 0.0, op)
    kind = "copy" if op.name in COPIES else "elementwise" if op.kind == "other" else op.kind
    return Kernel(kind, op.name, op_s(op, cluster), op)
