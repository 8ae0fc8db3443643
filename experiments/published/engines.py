"""Differences between a row's software and our step, substituted in a recorded step.

- RMSNorm is one kernel in CUDA since torch 2.9; before, and where an engine writes it in Python, eager code runs it op by op.
- Attention that is no flash kernel writes the square of scores, and reads it again for softmax, dropout and values.
- torchtitan's per-op checkpointing always keeps attention's output.
- KempnerForge adds up gradients unsharded, in float32, and reduces them once per step.
- float8: the blocks' matmuls are faster, and their factors are read and written once more; torchtitan gathers in float8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from published.configs import is_gpt, is_hand_fused, overlaps_tensor_messages
from published.losses import with_loss_of
from published.megatron import ENGINES as MEGATRON
from published.megatron import as_megatron_runs
from published.substitute import each_op, each_part
from published.xla import ENGINES as XLA
from published.xla import as_xla_runs
from published.zero import with_sharded_update

from tpresearch.simulate.prices import FLOAT8_EFFICIENCY
from tpresearch.simulate.trace import Op, Trace

if TYPE_CHECKING:
    from published.row import Row

FLOAT8 = 2 * FLOAT8_EFFICIENCY
"""By how much a large matmul in float8 is faster than in bfloat16, its casts apart: of twice the peak."""
CAST = 4
"""Bytes per element that a cast to float8 moves: read, written, written again transposed (cuBLAS takes one layout)."""
BY_NORMS = 2
"""The same, of activations, where norms and activation functions write float8 themselves, as Transformer Engine's do."""
BACKWARD = 2
"""Place of the first backward among a step's phases."""
ROTATION = ("flip", "neg", "cat", "add", "mul")
ONE_KERNEL_NORMS = ("internevo", "nanotron", "gpt-neox")
ONE_KERNEL_NORM = re.compile(r"(?<!no )(fused|triton|apex) \w*norm", re.IGNORECASE)
UNFUSED_ATTENTION = re.compile("unfused|eager|math|naive|native|softmax|standard|no.?flash", re.IGNORECASE)
FLASH_SINCE = 2023
"""The first year in which most software had flash attention (arXiv 2205.14135)."""


def as_engine_runs(row: Row, trace: Trace) -> Trace:
    """The recorded step as the row's engine runs it."""
    trace = with_sharded_update(row, with_loss_of(row, trace))
    engine = row.engine
    if engine in MEGATRON:
        trace = as_megatron_runs(row, trace, overlaps_tensor_messages(row))
    if engine in XLA:
        trace = as_xla_runs(row, trace)
    if not (row.is_true("compile") or is_hand_fused(row) or is_gpt(row)):
        if engine != "fms-fsdp" and row["compute_dtype"] != "fp32":
            trace = each_op(trace, _as_complex_rotations)
        if engine not in ONE_KERNEL_NORMS and not ONE_KERNEL_NORM.search(row["notes"]):
            trace = each_op(trace, lambda op: [op._replace(fused=-1)])
    if UNFUSED_ATTENTION.search(row["attn"]) or (not row["attn"] and (row.year or FLASH_SINCE) < FLASH_SINCE):
        trace = each_op(trace, _unfused_attention)
    if engine == "torchtitan" and row["ac"] == "selective_op":
        trace = each_op(trace, lambda op: [] if _is_attention_again(op) else [op])
    if row.is_float8:
        vocab = row.count("vocab")
        cast = BY_NORMS if engine in ("nemo", "megatron") else CAST
        of_output, gathered = (vocab, vocab // row.tp), engine == "torchtitan"
        trace = each_part(trace, partial(_with_float8, vocab=of_output, gathered=gathered, cast_bytes=cast))
    if engine == "kempnerforge" and row.batch[1] > 1:
        trace = _reduced_once(trace)
    return trace


def _as_complex_rotations(op: Op) -> list[Op]:
    """Rotary embeddings as one complex product: without the flips and the sum of ours, and half of the products."""
    if op.fused >= 0 or op.phase == "loss" or op.element != 4 or op.name not in ROTATION:
        return [op]
    if op.name != "mul" or len(op.reads) < 2:
        return [op] if op.name == "mul" else []
    reads, writes = (tuple((number, size // 2) for number, size in given) for given in (op.reads, op.writes))
    return [op._replace(reads=reads, writes=writes)]


def _unfused_attention(op: Op) -> list[Op]:
    """Attention as matmuls, a softmax and a dropout on the whole square of each head, forward or backward."""
    if op.kind != "attention":
        return [op]
    rows, heads, _, length, keys, width, backward, _ = op.shape
    square, mask = rows * heads * length * keys * op.element, rows * heads * length * keys

    def product(m: int, n: int, k: int) -> Op:
        return op._replace(kind="gemm", name="bmm", shape=(rows * heads, m, n, k), reads=(), writes=())

    def pointwise(name: str, read: int, written: int) -> Op:
        return op._replace(kind="other", name=name, shape=(), reads=((-1, read),), writes=((-2, written),))

    if not backward:
        return [
            product(length, keys, width),
            pointwise("softmax", square, square),
            pointwise("dropout", square, square + mask),
            product(length, width, keys),
        ]
    return [
        product(keys, width, length),
        product(length, keys, width),
        pointwise("dropout_backward", square + mask, square),
        pointwise("softmax_backward", 2 * square, square),
        product(length, width, keys),
        product(keys, width, length),
    ]


def _is_attention_again(op: Op) -> bool:
    """A forward within backward."""
    return op.kind == "attention" and op.phase == "backward" and not op.shape[6]


def _with_float8(part: Sequence[Op], vocab: tuple[int, int], gathered: bool, cast_bytes: int) -> Iterator[Op]:
    """Matmuls of the blocks that take as long as ones of a shorter inner dim, and a cast of each factor that is no weight.

    Args:
        vocab: sizes of a dim that only the output layer has. gathered: whether tensors are sent in float8.
        cast_bytes: that a cast moves per element.
    """
    weights = _weights(part)
    cast: set[tuple[str, int]] = set()
    of_forward = {n for op in part if op.phase == "forward" for n, _ in (*op.reads, *op.writes)}
    for op in part:
        if gathered and op.event and op.event.collective == "all_gather":
            op = op._replace(event=replace(op.event, tensor_bytes=op.event.tensor_bytes // 2))
        elif op.kind == "gemm" and not {*vocab} & {*op.shape}:
            for number, size in op.reads:
                if number not in weights and (op.phase, number) not in cast:
                    cast.add((op.phase, number))
                    bytes_moved = cast_bytes if number in of_forward else CAST
                    moved = ((-2 - number, size * bytes_moved // 2),)
                    yield op._replace(kind="other", name="to_float8", shape=(), reads=moved, writes=())
            products, m, n, k = op.shape
            op = op._replace(shape=(products, m, n, round(k / FLOAT8)))
        yield op


def _weights(part: Sequence[Op]) -> set[int]:
    """Storages of weights: those that are gathered, or, where none is, what is multiplied before anything has written it."""
    gathered = {number for op in part if op.name == "split_with_sizes_copy" for number, _ in op.reads}
    if gathered:
        return gathered
    found: set[int] = set()
    written: set[int] = set()
    for op in part:
        if op.kind == "gemm":
            found |= {number for number, _ in op.reads} - written
        written |= {number for number, _ in op.writes}
    return found


def _reduced_once(trace: Trace) -> Trace:
    """Gradients of all micro-batches but the last are added to unsharded ones in float32."""
    *earlier, last = trace.micro_batches
    between = _added(last)
    first = _added(earlier[0] if earlier else last)
    whole = sum(op.event.tensor_bytes for op in last if _reduces(op) and op.event)
    memory = {
        name: size + (whole if name.endswith("/gradients") and int(name.split()[0]) >= BACKWARD else 0)
        for name, size in trace.memory.items()
    }
    return Trace((first, between, last), trace.end, memory)


def _added(part: tuple[Op, ...]) -> tuple[Op, ...]:
    found = []
    for op in part:
        if op.name == "chunk_cat":
            continue
        if op.event and _reduces(op):
            sums, size = op.reads[0][0], op.event.tensor_bytes
            moved = {"reads": ((sums, size * 3 // 2),), "writes": ((sums, size),)}
            found.append(op._replace(kind="other", name="add_", event=None, **moved))
        else:
            found.append(op)
    return tuple(found)


def _reduces(op: Op) -> bool:
    return op.event is not None and op.event.issuer == "fsdp" and op.event.collective == "reduce_scatter"
