"""What XLA does differently from our step, substituted in a recorded one.

- Its gathers and scatters are of whole tensors, each into a buffer of its own, grouped in one NCCL call: there are no copies
  into and out of flat buffers as FSDP has.
- MaxText's policy save_qkv_proj keeps queries, keys and values, which full checkpointing would compute again.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from published.substitute import each_part, without_copies

from tpresearch.simulate.trace import Op, Trace

if TYPE_CHECKING:
    from published.row import Row

ENGINES = ("maxtext", "pax", "paxml", "jax", "levanter")
KEEPS_PROJECTIONS = re.compile("save_qkv_proj")


def as_xla_runs(row: Row, trace: Trace) -> Trace:
    """The step as XLA runs it."""
    trace = each_part(trace, without_copies)
    return each_part(trace, _with_kept_projections) if KEEPS_PROJECTIONS.search(row["notes"]) else trace


def _with_kept_projections(part: Sequence[Op]) -> list[Op]:
    """Without the matmuls before attention that backward repeats."""
    first = next((i for i, op in enumerate(part) if op.kind == "attention"), 0)
    count = sum(op.kind == "gemm" for op in part[:first])
    repeated: set[int] = set()
    matmuls: list[int] = []
    for place, op in enumerate(part):
        if op.kind == "gemm":
            matmuls.append(place)
        elif op.kind == "attention" and op.phase == "backward" and not op.shape[6]:
            repeated |= set(matmuls[-count:])
    return [op for place, op in enumerate(part) if place not in repeated]
