"""The update of ZeRO-1, substituted for a replicated one: each replica updates its part of the weights.

Weights and moments of that part are float32. Of the gradients' sum a scatter remains, and updated weights are gathered after
the update. NeMo's recipes hide both behind matmuls (overlap_grad_sync, overlap_param_sync): there they cost what the sum does.
So they do where fewer ranks than all replicas share the state, since each of these groups still sums with the others.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from published.substitute import each_op

from tpresearch.config.axes import REPLICATE
from tpresearch.ledger.entries import Event
from tpresearch.simulate.trace import Op, Trace

if TYPE_CHECKING:
    from published.row import Row

SHARDED = re.compile(r"distributed optimizer|zero-?1\b(?! from)", re.IGNORECASE)
OVER = re.compile(r"sharded over (\d+) ranks")
HIDES_GATHER = ("nemo", "megatron", "megatron-lm")
WEIGHT_BYTES = 2
"""Per element of the weights that are gathered."""


def with_sharded_update(row: Row, trace: Trace) -> Trace:
    """The step with the optimizer's state sharded over replicas, where the row says so."""
    stated = OVER.search(row["notes"])
    ranks = min(row.replicas, int(stated[1]) if stated else row.replicas)
    if ranks == 1 or not SHARDED.search(f"{row['engine']} {row['notes']}"):
        return trace
    update = next((op for op in trace.end if op.kind == "optimizer"), None)
    if update is None:
        return trace
    elements = sum(
        sum(size for _, size in op.reads) // (4 * op.element) for op in trace.end if op.kind == "optimizer"
    )
    end = [_of_a_part(op, ranks) if op.kind == "optimizer" else op for op in trace.end]
    if row.engine not in HIDES_GATHER and ranks == row.replicas:
        sent = elements * WEIGHT_BYTES
        event = Event(REPLICATE.name, "optimizer", "optimizer", "all_gather", sent, ranks)
        end.append(
            update._replace(kind="collective", name="all_gather_", event=event, reads=((0, sent),), writes=())
        )
        trace = each_op(trace, lambda op: [_scattered(op)])
    state = elements * (8 + 4 * (update.element == 2)) // ranks
    memory = {
        name: state if name.endswith("/optimizer") and size else size for name, size in trace.memory.items()
    }
    return Trace(trace.micro_batches, tuple(end), memory)


def _of_a_part(op: Op, ranks: int) -> Op:
    wider = 4 // op.element
    return op._replace(element=4, reads=tuple((n, -(-size * wider // ranks)) for n, size in op.reads))


def _scattered(op: Op) -> Op:
    """A sum over replicas sends twice what a scatter does."""
    event = op.event
    if event is None or (event.axis, event.collective) != (REPLICATE.name, "all_reduce"):
        return op
    return op._replace(event=replace(event, tensor_bytes=event.tensor_bytes // 2))
