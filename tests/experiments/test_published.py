"""What stands in the place of recorded ops, where a published step was computed by other software; one site left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from configs import is_gpt, parts
from engines import CAST, as_run
from left_out import by_the_others
from losses import _changed
from row import Row, read
from score import Scored, scored
from stacks import cluster_name

from tpresearch.config.errors import ConfigError
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
    told = as_run(row, step(op("backward", "chunk_cat", 200, 400), scatter))
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
    assert as_run(kept, step(again, backward)).micro_batches[0] == (backward,)
    assert as_run(whole, step(again, backward)).micro_batches[0] == (again, backward)


def test_float8_casts_each_factor_once_and_leaves_the_output_layer() -> None:
    unsharded = op("forward", "split_with_sizes_copy", 1, 1)._replace(reads=((1, 1), (7, 9)))
    both = op("forward", "mm", 0, 0, "gemm")._replace(reads=((5, 80), (7, 9)), shape=(1, 4, 8, 1000))
    output = both._replace(shape=(1, 4, 64, 1000))
    row = Row({**LLAMA, "engine": "torchtitan/fsdp2", "compile": "1", "compute_dtype": "fp8"})
    told = as_run(row, step(unsharded, both, both, output)).micro_batches[0]
    assert [o.name for o in told] == ["split_with_sizes_copy", "to_float8", "mm", "mm", "mm"]
    assert told[1].bytes_moved == 80 * CAST // 2  # 40 elements
    assert told[2].shape[3] < 600
    assert told[4].shape[3] == 1000


def test_norms_of_an_older_stack_are_many_kernels_in_eager_code_alone() -> None:
    norm = op("forward", "mul", 4, 4)._replace(fused=0)
    eager = Row({**LLAMA, "engine": "torchtitan/fsdp2", "compile": "0"})
    compiled = Row({**eager.values, "compile": "1"})
    assert [as_run(row, step(norm)).micro_batches[0][0].fused for row in (eager, compiled)] == [-1, 0]


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


SMALL = {
    "dim": "8",
    "heads": "2",
    "layers": "2",
    "ffn": "16",
    "vocab": "64",
    "seq": "2k",
    "gpus": "1,024",
    "gpu": "H100",
}


@pytest.mark.parametrize(
    ("cells", "name"),
    [
        ({"gpu": "NVIDIA H100-SXM5-80GB"}, "h100_dgx"),
        ({"gpu_note": "SXM5 HBM2e 500 W"}, "h100_500w"),
        ({"gpu": "h100_80gb"}, "h100_dgx"),
        ({"gpu": "H100 PCIe"}, "h100_pcie"),
        ({"gpu": "8xA100", "gpu_mem_gb": "40 GB"}, "a100_40"),
    ],
)
def test_a_card_is_found_in_a_longer_name(cells: dict[str, str], name: str) -> None:
    assert cluster_name(Row({**SMALL, **cells})) == name


@pytest.mark.parametrize("gpu", ["GH200", "GB200", "MI300X", "H100 NVL", "A100-PCIE-40GB", "H800", ""])
def test_a_card_of_another_kind_is_refused(gpu: str) -> None:
    with pytest.raises(ConfigError, match="gpu"):
        cluster_name(Row({**SMALL, "gpu": gpu}))


def test_memory_is_read_off_a_longer_name_too() -> None:
    assert cluster_name(Row({**SMALL, "gpu": "A100-SXM4-40GB"})) == "a100_40"


def test_cells_are_read_with_their_units() -> None:
    row = Row({**SMALL, "step_s": "1,200 ms", "internode_gbps_per_gpu": "50 GB/s", "ac": "selective op"})
    assert (row.count("seq"), row.world, row.measured_s) == (2048, 1024, pytest.approx(1.2))
    assert row.number("internode_gbps_per_gpu") == 400
    assert len(parts(row)) == 2
    told = Row({**SMALL, "tok_s_gpu": "2.048k", "mb": "3", "ga": "2"})
    assert told.measured_s == pytest.approx(6.0)


@pytest.mark.parametrize("name", ["pp", "cp", "ep"])
def test_a_row_of_parallelism_that_is_not_here_is_refused(name: str) -> None:
    assert parts(Row({**SMALL, name: "1"}))
    with pytest.raises(ConfigError, match=f"{name}=2"):
        parts(Row({**SMALL, name: "2"}))


@pytest.mark.parametrize("name", ["step_s", "tok_s_gpu"])
def test_a_row_whose_measurement_is_no_number_is_refused_before_it_is_simulated(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=fast: "):
        scored(Row({name: "fast", "gpu": "no card"}))


@pytest.mark.parametrize(
    "cells",
    [
        {"gbs": "100", "mb": "1", "ga": "1"},
        {"dp_shard": "512"},
        {"tp": "3"},
        {"layers": ""},
        {"layers": "-2"},
        {"layers": "1e999"},
        {"gpus": "1e12"},
        {"dim": "47,73"},
        {"arch": "mixtral"},
        {"model": "mamba-2.8b"},
        {"arch": "unheard of"},
        {"experts": "8"},
    ],
)
def test_a_row_that_contradicts_itself_or_cannot_be_read_is_refused(cells: dict[str, str]) -> None:
    row = {**SMALL, "arch": "llama"}
    assert parts(Row(row))
    with pytest.raises(ConfigError):
        parts(Row(row | cells))


def test_what_a_row_leaves_open_of_its_batch_follows_from_the_rest() -> None:
    told = Row({**SMALL, "gpus": "16", "gbs": "96", "mb": "2"})
    assert told.batch == (2, 3)
    assert Row({**SMALL, "gpus": "16", "tp": "4", "gbs": "96", "ga": "4"}).batch == (6, 4)


@pytest.mark.parametrize(
    ("cells", "gpt"),
    [
        ({"arch": "llama", "ffn_kind": "swiglu"}, False),
        ({"arch": "gpt-neox", "ffn_kind": ""}, True),
        ({"model": "Mistral-7B"}, False),
        ({"arch": "other", "ffn_kind": "gelu"}, True),
        ({}, False),
    ],
)
def test_a_family_is_found_by_its_feed_forward_or_its_name(cells: dict[str, str], gpt: bool) -> None:
    assert is_gpt(Row(cells)) is gpt


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_rows_are_read_whatever_separates_them(tmp_path: Path, separator: str) -> None:
    lines = [["ID", " gpus", "notes"], ["A", "8", '"two\nlines"'], ["", "16"], [""]]
    text = "\ufeff" + "\r\n".join(separator.join(line) for line in lines)
    (tmp_path / "rows.csv").write_text(text, newline="", encoding="utf-8")
    first, second = read(tmp_path / "rows.csv")
    assert (first["id"], first.world, first["notes"]) == ("A", 8, "two\nlines")
    assert (second["id"], second.world, second["notes"]) == ("row 2", 16, "")
