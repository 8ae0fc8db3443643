"""What Megatron-LM and NeMo do differently from our step, substituted in a recorded one.

- Activations are [s, b, h]: a gather or scatter of the sequence is along the first dim, and needs no copy (Megatron-LM's
  megatron/core/tensor_parallel/mappings.py).
- In backward of a column-parallel layer the gradient of the input is summed over ranks while that of the weight is computed;
  where the sequence is sharded, the input, of which a rank kept its part, is gathered again beside the first of these two
  matmuls (LinearWithGradAccumulationAndAsyncCommunication in megatron/core/tensor_parallel/layers.py; since 2022).
- A norm is a kernel of its own; what precedes it, the sum with the residual, is another (fused with bias and dropout).
- NeMo's recipes: the matmul that computes a weight's gradient adds it to those of earlier micro-batches
  (gradient_accumulation_fusion), and Transformer Engine's sums the bias's gradient, too.
- Megatron-FSDP keeps weights and gradients where its collectives read and write them ("zero copy communication", says
  pypi.org/project/megatron-fsdp).
- Cross-entropy over shards of the vocabulary works in place on float32 logits, and its backward scales the softmax that
  forward left (megatron/core/tensor_parallel/cross_entropy.py); NeMo's recipes fuse its ops (cross_entropy_loss_fusion).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from published.substitute import each_part, without_copies

from tpresearch.ledger.entries import Event
from tpresearch.simulate.trace import Op, Trace

if TYPE_CHECKING:
    from published.row import Row

ENGINES = ("megatron", "megatron-lm", "nemo")
OVERLAPS_SINCE = 2022
"""The first year in which a layer's messages ran beside its matmuls (arXiv 2205.05198)."""
LARGE = 2**20
"""Bytes below which an op of the loss is left as it is."""
NOT_IN_PLACE = ("zeros_like", "exp", "add")
"""Ops of our sharded loss's backward that Megatron-LM does without."""
FUSED_AWAY = ("amax", "sum", "mul")
"""Ops that become a part of another kernel where the loss is fused."""


def as_megatron_runs(row: Row, trace: Trace, in_chunks: bool) -> Trace:
    """The step as Megatron-LM or NeMo runs it.

    Args:
        in_chunks: whether tensor-parallel messages are sent in chunks, by copy engines.
    """
    is_nemo = row.engine == "nemo"
    trace = each_part(trace, without_copies)
    if row.tp > 1:
        trace = each_part(trace, partial(_with_sharded_loss_in_place, fused=is_nemo))
        trace = each_part(trace, _without_layout_copies)
    trace = each_part(trace, _with_norms_alone)
    if is_nemo:
        trace = each_part(trace, _without_sums_of_gradients)
    if row.tp > 1 and (row.year or OVERLAPS_SINCE) >= OVERLAPS_SINCE:
        trace = each_part(trace, partial(_overlapped, gathers=not in_chunks))
    return trace


def _without_layout_copies(part: Sequence[Op]) -> list[Op]:
    """Without the copies behind gathers and before scatters along the second dim."""
    found: list[Op] = []
    gathered = 0
    for place, op in enumerate(part):
        follows = part[place + 1].event if place + 1 < len(part) else None
        scattered = follows.tensor_bytes if follows and follows.collective == "reduce_scatter" else 0
        if op.name == "cat" and sum(size for _, size in op.writes) in (gathered, scattered):
            gathered = 0
            continue
        if op.event and op.event.issuer == "dtensor" and op.event.collective == "all_gather":
            gathered = op.event.tensor_bytes
        elif op.kind != "wait":
            gathered = 0
        found.append(op)
    return found


def _with_sharded_loss_in_place(part: Sequence[Op], fused: bool) -> list[Op]:
    """(Only sharded logits have these ops: whole ones go through one kernel of log-softmax.)"""
    begins = next((i for i, op in enumerate(part) if op.phase == "backward"), len(part))
    ends = next((i for i in range(begins, len(part)) if part[i].kind == "gemm"), len(part))
    found = []
    for place, op in enumerate(part):
        of_backward = begins <= place < ends
        away = NOT_IN_PLACE * of_backward + FUSED_AWAY * (fused and (of_backward or op.phase == "loss"))
        if op.kind != "other" or op.name not in away or op.bytes_moved < LARGE:
            found.append(op)
    return found


def _with_norms_alone(part: Sequence[Op]) -> list[Op]:
    """Each norm between two marks, over which nothing is fused."""
    found: list[Op] = []
    last: int | str = ""
    for op in part:
        norm = op.name if "layer_norm" in op.name else op.fused if op.fused >= 0 else ""
        if norm != last and (norm != "" or last != ""):
            found.append(op._replace(kind="wait", name="boundary", event=None, reads=((-1, 0),), writes=()))
        found.append(op)
        last = norm
    return found


def _without_sums_of_gradients(part: Sequence[Op]) -> list[Op]:
    """Without adding a weight's gradient to earlier ones, and without the sum that is a bias's gradient."""
    touched: set[int] = set()
    """Storages that the last matmul of backward read and wrote."""
    found = []
    for op in part:
        if op.phase == "backward" and op.kind == "gemm":
            touched = {number for number, _ in (*op.reads, *op.writes)}
        elif op.phase == "backward" and op.name in ("add_", "sum") and {n for n, _ in op.reads} & touched:
            continue
        found.append(op)
    return found


def _overlapped(part: Sequence[Op], gathers: bool) -> list[Op]:
    """Each sum of an input's gradient begins when the matmul that computes it ends, before the one of the weight's.

    Args:
        gathers: whether the input is gathered again.
    """
    found: list[Op] = []
    for op in part:
        matmuls = [i for i, earlier in enumerate(found) if earlier.kind == "gemm"][-2:]
        event = op.event
        if event is None or not _sums_in_backward(op, event) or not _share_a_factor(found, matmuls):
            found.append(op)
            continue
        first, second = (found[i] for i in matmuls)
        if _written(first) != event.tensor_bytes:  # the output layer's weight is first
            first, second = second, first
        between, after = found[matmuls[0] + 1 : matmuls[1]], found[matmuls[1] + 1 :]
        found[matmuls[0] :] = [first, op, second, *between, *after]
        if gathers and event.collective == "reduce_scatter":
            gathered = replace(event, collective="all_gather")
            storage = ((-1 - op.reads[0][0], event.tensor_bytes),)
            send = op._replace(name="all_gather_into_tensor", event=gathered, reads=op.writes, writes=storage)
            wait = op._replace(kind="wait", name="wait_tensor", event=None, reads=storage, writes=storage)
            found[matmuls[0] : matmuls[0] + 2] = [send, first, op, wait]
    return found


def _sums_in_backward(op: Op, event: Event) -> bool:
    return op.phase == "backward" and event.issuer == "dtensor" and event.collective != "all_gather"


def _share_a_factor(ops: Sequence[Op], matmuls: Sequence[int]) -> bool:
    """Whether both read the gradient of the layer's output."""
    if len(matmuls) < 2:
        return False
    first, second = ({number for number, _ in ops[i].reads} for i in matmuls)
    return bool(first & second)


def _written(op: Op) -> int:
    return sum(size for _, size in op.writes)
