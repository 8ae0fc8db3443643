"""What stands in the place of recorded ops, where a published step was computed by other software; one site left out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from published.engines import CAST, as_engine_runs
from published.left_out import by_the_others
from published.losses import _changed
from published.one_run import by_first_row
from published.recorded import Scored
from published.row import Row
from published.stacks import cluster_of_row

from tpresearch.ledger.entries import Event
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


LLAMA = {"vocab": "64", "gpus": "4", "ga": "2", "compute_dtype": "bf16"}
REDUCE = Event("dp_shard", "backward", "fsdp", "reduce_scatter", 400, 4)


def step(*ops: Op) -> Trace:
    return Trace(
        (ops, ops), (), {"0 forward/gradients": 1, "2 backward/gradients": 1, "5 backward/gradients": 2}
    )


def test_gradients_that_are_reduced_once_per_step_are_added_up_whole_before() -> None:
    scatter = op("backward", "_reduce_scatter_base_", 400, 100, "collective")._replace(event=REDUCE)
    row = Row({**LLAMA, "engine": "kempnerforge/fsdp2", "compile": "1"})
    told = as_engine_runs(row, step(op("backward", "chunk_cat", 200, 400), scatter))
    first, between, last = told.micro_batches
    assert first == between
    assert [(o.name, o.reads[0][1], o.writes[0][1]) for o in first] == [("add_", 600, 400)]
    assert [o.name for o in last] == ["chunk_cat", "_reduce_scatter_base_"]
    assert [*told.memory.values()] == [1, 401, 402]


def test_attention_is_not_computed_again_where_it_is_always_kept() -> None:
    shape = (1, 1, 1, 8, 8, 4)
    again, backward = (
        op("backward", "sdpa", 1, 1, "attention")._replace(shape=(*shape, flag, 1)) for flag in (0, 1)
    )
    kept = Row({**LLAMA, "engine": "torchtitan/fsdp2", "compile": "1", "ac": "selective_op"})
    whole = Row({**kept.values, "ac": "full"})
    assert as_engine_runs(kept, step(again, backward)).micro_batches[0] == (backward,)
    assert as_engine_runs(whole, step(again, backward)).micro_batches[0] == (again, backward)


def test_float8_casts_each_factor_once_and_leaves_the_output_layer() -> None:
    unsharded = op("forward", "split_with_sizes_copy", 1, 1)._replace(reads=((1, 1), (7, 9)))
    both = op("forward", "mm", 0, 0, "gemm")._replace(reads=((5, 80), (7, 9)), shape=(1, 4, 8, 1000))
    output = both._replace(shape=(1, 4, 64, 1000))
    row = Row({**LLAMA, "engine": "torchtitan/fsdp2", "compile": "1", "compute_dtype": "fp8"})
    told = as_engine_runs(row, step(unsharded, both, both, output)).micro_batches[0]
    assert [o.name for o in told] == ["split_with_sizes_copy", "to_float8", "mm", "mm", "mm"]
    assert told[1].bytes_moved == 80 * CAST // 2  # 40 elements
    assert told[2].shape[3] < 600
    assert told[4].shape[3] == 1000


@pytest.mark.parametrize(
    ("cells", "fused"),
    [
        ({"engine": "torchtitan/fsdp2"}, -1),
        ({"engine": "torchtitan/fsdp2", "compile": "1"}, 0),
        ({"engine": "never heard of"}, -1),
        ({"engine": "never heard of", "notes": "fused RMSNorm kernel"}, 0),
        ({"engine": "never heard of", "notes": "no fused RMSNorm"}, -1),
        ({"engine": "nanotron/zero1"}, 0),
        ({"engine": "nemo/megatron"}, 0),
        ({"engine": "never heard of", "ffn_kind": "gelu"}, 0),  # a LayerNorm always was one kernel
    ],
)
def test_norms_are_many_kernels_in_eager_code_alone(cells: dict[str, str], fused: int) -> None:
    norm = op("forward", "mul", 4, 4)._replace(fused=0)
    assert as_engine_runs(Row({**LLAMA, **cells}), step(norm)).micro_batches[0][0].fused == fused


def test_attention_that_is_no_flash_kernel_moves_the_square_of_scores() -> None:
    shape = (2, 3, 3, 512, 512, 64)
    forward, backward = (
        op(phase, "sdpa", 1, 1, "attention")._replace(shape=(*shape, flag, 1), element=2)
        for flag, phase in enumerate(("forward", "backward"))
    )
    row = Row({**LLAMA, "engine": "megatron/ddp", "ffn_kind": "gelu", "attn": "unfused"})
    told = as_engine_runs(row, step(forward, backward)).micro_batches[0]
    square = 6 * 512 * 512
    # Of softmax, dropout with its mask, and their backward.
    read_and_written = (2 + 2) + (2 + 2 + 1) + (2 + 1 + 2) + (4 + 2)
    assert sum(o.bytes_moved for o in told if o.kind == "other") == square * read_and_written
    flops = [2 * math.prod(o.shape) for o in told if o.kind == "gemm"]
    assert flops == [2 * square * 64] * 6
    assert as_engine_runs(Row({**row.values, "attn": "fa2"}), step(forward)).micro_batches[0] == (forward,)
    before_flash = Row({**row.values, "attn": "", "source_file": "arXiv 2104.04473, table 1"})
    assert len(as_engine_runs(before_flash, step(forward)).micro_batches[0]) == 4


@pytest.mark.parametrize(
    ("cells", "loss"),
    [
        ({"engine": "never heard of"}, "_log_softmax"),
        ({"engine": "never heard of", "compile": "1"}, "cross_entropy"),
        ({"engine": "llm.c"}, "cross_entropy"),
        ({"engine": "lightning", "notes": "fused RMSNorm, SwiGLU and cross-entropy"}, "cross_entropy"),
        ({"engine": "torchtitan/fsdp2", "compile": "1", "source_file": "2024-10"}, "_log_softmax"),
    ],
)
def test_the_loss_is_fused_where_the_whole_model_is_compiled_or_it_is_written_so(
    cells: dict[str, str], loss: str
) -> None:
    told = as_engine_runs(Row({**LLAMA, **cells}), Trace((recorded(1),), (), {})).micro_batches[0]
    assert loss in [o.name for o in told]


def test_a_site_that_is_left_out_is_predicted_with_the_rate_of_the_others() -> None:
    """Two sites took 3 s where 2 of 4 s are matmuls, so theirs are twice as fast as said; the third is told that."""
    rows = [
        Row({"family": family, "gpu": "H100", "step_s": step_s})
        for family, step_s in (("a", "3"), ("b", "3"), ("c", "4"))
    ]
    told = by_the_others([Scored(row, 4.0, 3.6, 4.4, 0.0, 2.0) for row in rows])
    assert told[2].step_s == pytest.approx(3.0)
    assert (told[2].low_s, told[2].high_s) == pytest.approx((2.7, 3.3))
    assert told[0].step_s == pytest.approx(4 - 2 + 2 / 1.5)  # one says twice, one says no faster


@dataclass
class MatmulsAlone:
    """A recorded row whose step is matmuls, of 1 s at the whole peak."""

    row: Row

    def on(self, plain: Mapping[str, Any]) -> Scored:
        step_s = 1 / plain["numbers"]["gemm_efficiency"]["value"]
        return Scored(self.row, step_s, 0.9 * step_s, 1.1 * step_s, 0.0, step_s)


def test_a_sites_first_row_says_how_fast_its_others_are() -> None:
    """It took twice as long as predicted, so they do; another site's rows are as they were."""

    def row(family: str, step_s: float) -> Any:
        return MatmulsAlone(Row({"family": family, "gpu": "H100", "step_s": str(step_s)}))

    factors: dict[str, float] = {}
    plain = row("a", 1).on(cluster_of_row(row("a", 1).row)).step_s
    assert by_first_row(row("a", 1e6), factors) is None  # no rates make it so slow
    assert by_first_row(row("a", 2 * plain), factors) is None
    told = by_first_row(row("a", 1), factors)
    assert told
    assert told.step_s == pytest.approx(2 * plain, rel=1e-3)
    assert by_first_row(row("b", plain), factors) is None
    assert factors["b"] == pytest.approx(1.0, rel=1e-3)
