"""The loss as a row's software computes it, substituted for ours in a recorded step.

- llm-foundry's MPT takes flash-attn's cross-entropy (its default, loss_fn: fused_crossentropy), and torchtitan compiles its
  loss since February 2025 (its commits e8977b007, d1f62be73): one kernel reads the logits and one writes their gradient,
  and no copy in float32 is ever held.
- Composer then computes two metrics of each micro-batch (cross-entropy and perplexity, train_metrics), each by torch's own
  kernels on a copy in float32, once backward has freed its activations.
- KempnerForge and fms-fsdp call F.cross_entropy on logits in bfloat16: torch's kernels, without the copy.
- So do llm.c, flash-attention's training code, and software that compiles a whole model.
- Ours, as recorded with train.loss_chunk=null, and torchtitan's eager one copy the logits to float32.

What a row's software was when is read off the name of its source.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from tpresearch.simulate.trace import Op, Trace

if TYPE_CHECKING:
    from published.row import Row

LOSS_COMPILED = re.compile(r"20(2[5-9]|3)")
BLOCKS_COMPILED = ("torchtitan",)
"""Software that compiles block by block; what else compiles, compiles the loss with the model."""
FUSED = re.compile(r"llm\.c|flash-attention|fused [^;.]*(cross-entropy|classifier)", re.IGNORECASE)
CASTS = ("_to_copy",)
SOFTMAX = ("_log_softmax", "nll_loss_forward", "nll_loss_backward", "_log_softmax_backward_data")


def with_loss_of(row: Row, trace: Trace) -> Trace:
    """The step with the loss of the row's engine."""
    engine, compiled = row.engine, row.is_true("compile")
    if engine == "composer":
        return _changed(trace, fused=True, metrics=2)
    if engine == "torchtitan" and compiled and LOSS_COMPILED.search(row["source_file"]):
        return _changed(trace, fused=True)
    if engine in ("kempnerforge", "fms-fsdp"):
        return _changed(trace, fused=False)
    if (compiled and engine not in BLOCKS_COMPILED) or FUSED.search(f"{engine} {row['notes']}"):
        return _changed(trace, fused=True)
    return trace


def _changed(trace: Trace, fused: bool, metrics: int = 0) -> Trace:
    first = trace.micro_batches[0]
    place = next((i for i, op in enumerate(first) if op.phase == "loss" and op.name in CASTS), None)
    if place is None:  # a loss on shards of the vocabulary, or of logits that are wide already
        return trace
    logits_bytes = first[place].reads[0][1]
    parts = tuple((*_part(part, fused), *_metric(part) * metrics) for part in trace.micro_batches)
    return Trace(parts, trace.end, _held(trace.memory, logits_bytes, fused))


def _part(part: tuple[Op, ...], fused: bool) -> list[Op]:
    mine = _of_loss(part)
    forward = [i for i in mine if part[i].phase == "loss"]
    backward = [i for i in mine if part[i].phase == "backward"]
    logits, gradient = part[forward[0]].reads[0], part[backward[-1]].writes[0]
    found = []
    for place, op in enumerate(part):
        if place not in mine:
            found.append(op)
        elif fused and place == forward[-1]:
            found.append(op._replace(name="cross_entropy", reads=(logits,), writes=()))
        elif fused and place == backward[-1]:
            found.append(op._replace(name="cross_entropy_backward", reads=(logits,), writes=(gradient,)))
        elif not fused and op.name in SOFTMAX:
            found.append(
                op._replace(reads=_narrow(op.reads, logits[1]), writes=_narrow(op.writes, logits[1]))
            )
    return found


def _metric(part: tuple[Op, ...]) -> list[Op]:
    return [op for op in part if op.phase == "loss" and op.name in (*CASTS, *SOFTMAX)]


def _of_loss(part: tuple[Op, ...]) -> list[int]:
    """Places of its ops, in their order: the phase's, and those of backward before the first matmul."""
    begins = next(i for i, op in enumerate(part) if op.phase == "backward")
    ends = next(i for i, op in enumerate(part) if i > begins and op.kind == "gemm")
    return [
        i
        for i, op in enumerate(part)
        if (op.phase == "loss" or begins <= i < ends) and op.name in (*CASTS, *SOFTMAX)
    ]


def _narrow(touched: tuple[tuple[int, int], ...], logits_bytes: int) -> tuple[tuple[int, int], ...]:
    return tuple((number, min(size, logits_bytes)) for number, size in touched)


def _held(memory: dict[str, int], logits_bytes: int, fused: bool) -> dict[str, int]:
    """At the loss and where backward begins: activations as forward left them, logits and their gradient, and of torch's
    kernels the log-softmax and its gradient beside."""
    found = dict(memory)
    held = 0
    for name in memory:
        moment, _, kind = name.partition("/")
        phase = moment.partition(" ")[2]
        if phase == "forward" and kind == "activations":
            held = memory[name]
        if phase not in ("loss", "backward"):
            continue
        if kind == "activations":
            found[name] = held + (0 if fused else logits_bytes)
        elif kind == "temporaries":
            found[name] = min(memory[name], 2 * logits_bytes)
    return found
