"""What stands in the place of a recorded loss, where a published step was computed by other software."""

from __future__ import annotations

import pytest
from published.losses import _changed

from tpresearch.simulate.trace import Op, Trace

LOGITS, WIDE = 1000, 2000
"""Bytes in bfloat16 and in float32."""


def op(phase: str, name: str, reads: int, writes: int, kind: str = "other") -> Op:
    return Op(phase, kind, name, ((1, reads),), ((2, writes),), 4, (), None, -1)


def recorded(before: int) -> tuple[Op, ...]:
    return (
        *(op("forward", "add", 1, 1) for _ in range(before)),
        op("loss", "_to_copy", LOGITS, WIDE),
        op("loss", "_log_softmax", WIDE, WIDE),
        op("loss", "nll_loss_forward", WIDE, 4),
        op("backward", "nll_loss_backward", WIDE, WIDE),
        op("backward", "_log_softmax_backward_data", WIDE, WIDE),
        op("backward", "_to_copy", WIDE, LOGITS),
        op("backward", "mm", LOGITS, 1, "gemm"),
    )


@pytest.mark.parametrize("before", range(40))
def test_a_fused_loss_reads_and_writes_narrow_logits_wherever_it_stands(before: int) -> None:
    (part,) = _changed(Trace((recorded(before),), (), {}), fused=True).micro_batches
    found = [(o.name, o.reads[0][1], [size for _, size in o.writes]) for o in part[before:]]
    assert found == [
        ("cross_entropy", LOGITS, []),
        ("cross_entropy_backward", LOGITS, [LOGITS]),
        ("mm", LOGITS, [1]),
    ]
