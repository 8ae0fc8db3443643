"""What published software does differently from our step: Megatron-LM and NeMo, XLA, and ZeRO-1."""

from __future__ import annotations

import pytest
from published.engines import as_engine_runs
from published.megatron import as_megatron_runs
from published.row import Row
from published.xla import as_xla_runs
from published.zero import with_sharded_update

from tpresearch.ledger.entries import Event
from tpresearch.simulate.trace import Op, Touched, Trace

MIB = 2**20


def op(
    kind: str,
    name: str,
    reads: Touched = (),
    writes: Touched = (),
    phase: str = "backward",
    event: Event | None = None,
    shape: tuple[int, ...] = (),
    element: int = 2,
) -> Op:
    return Op(phase, kind, name, reads, writes, element, shape, event, -1)


def sent(collective: str, axis: str = "tp", issuer: str = "dtensor") -> Event:
    return Event(axis, "backward", issuer, collective, 4 * MIB, 4)


def step(*ops: Op, end: tuple[Op, ...] = (), memory: dict[str, int] | None = None) -> Trace:
    return Trace((ops,), end, memory or {})


def names(trace: Trace) -> list[str]:
    return [one.name for one in trace.micro_batches[0]]


def column_backward() -> Trace:
    """Of a column-parallel layer (weight 1, input 2): gathered gradient 3, of the input 4, of the weight 5."""
    return step(
        op("gemm", "dgrad", ((3, 8), (1, 8)), ((4, 4 * MIB),)),
        op("gemm", "wgrad", ((3, 8), (2, 8)), ((5, 8),)),
        op("other", "sum", ((3, 8),), ((6, 8),)),
        op("other", "add_", ((7, 8), (5, 8)), ((7, 8),)),
        op("other", "cat", ((4, MIB),) * 4, ((8, 4 * MIB),)),
        op("collective", "scatter", ((8, 4 * MIB),), ((9, MIB),), event=sent("reduce_scatter")),
        op("wait", "wait_tensor", ((9, MIB),), ((9, MIB),)),
    )


@pytest.mark.parametrize(
    ("engine", "in_chunks", "found"),
    [
        ("nemo", True, ["dgrad", "scatter", "wgrad", "wait_tensor"]),
        (
            "nemo",
            False,
            ["all_gather_into_tensor", "dgrad", "scatter", "wait_tensor", "wgrad", "wait_tensor"],
        ),
        ("megatron", True, ["dgrad", "scatter", "wgrad", "sum", "add_", "wait_tensor"]),
    ],
)
def test_megatron_sums_an_inputs_gradient_beside_the_matmul_of_the_weights(
    engine: str, in_chunks: bool, found: list[str]
) -> None:
    row = Row({"engine": engine, "tp": "4", "sp": "1"})
    assert names(as_megatron_runs(row, column_backward(), in_chunks)) == found


def test_megatron_of_2021_waits_for_its_messages() -> None:
    row = Row({"engine": "megatron", "tp": "4", "source_file": "arXiv 2104.04473"})
    assert names(as_megatron_runs(row, column_backward(), False))[:2] == ["dgrad", "wgrad"]


def test_megatron_gathers_along_the_first_dim_without_a_copy() -> None:
    gathered = step(
        op("collective", "gather", ((1, MIB),), ((2, 4 * MIB),), "forward", sent("all_gather")),
        op("wait", "wait_tensor", ((2, 4 * MIB),), ((2, 4 * MIB),), "forward"),
        op("other", "cat", ((2, MIB),) * 4, ((3, 4 * MIB),), "forward"),
        op("other", "cat", ((4, MIB),) * 4, ((5, 4 * MIB),), "forward"),
    )
    row = Row({"engine": "megatron", "tp": "4"})
    assert names(as_megatron_runs(row, gathered, False)) == ["gather", "wait_tensor", "cat"]


def test_nothing_is_fused_over_a_norm_of_megatron() -> None:
    trace = step(*(op("other", name, phase="forward") for name in ("add", "native_layer_norm", "mul")))
    found = names(as_megatron_runs(Row({"engine": "megatron"}), trace, False))
    assert found == ["add", "boundary", "native_layer_norm", "boundary", "mul"]


@pytest.mark.parametrize(
    ("engine", "left"), [("megatron", ["amax", "sum", "mul", "dgrad"]), ("nemo", ["dgrad"])]
)
def test_cross_entropy_of_megatron_works_in_place(engine: str, left: list[str]) -> None:
    logits = ((1, 8 * MIB),)
    loss = [op("other", name, logits, phase="loss") for name in ("amax", "sum")]
    backward = [op("other", name, logits) for name in ("zeros_like", "exp", "add", "mul")]
    trace = step(*loss, *backward, op("gemm", "dgrad"))
    assert names(as_megatron_runs(Row({"engine": engine, "tp": "2"}), trace, False)) == left


@pytest.mark.parametrize("engine", ["xla", "nemo"])
def test_xla_and_megatron_fsdp_copy_nothing_into_flat_buffers(engine: str) -> None:
    row, copied = Row({"engine": engine}), step(op("other", "chunk_cat", ((1, 8),), ((2, 8),)))
    trace = as_xla_runs(row, copied) if engine == "xla" else as_megatron_runs(row, copied, False)
    found = trace.micro_batches[0]
    assert [(one.reads, one.writes) for one in found] == [(((1, 0),), ((2, 0),))]


@pytest.mark.parametrize(("notes", "count"), [("policy save_qkv_proj", 0), ("", 3)])
def test_projections_that_are_kept_are_not_computed_again(notes: str, count: int) -> None:
    projections = [("gemm", name) for name in "qkv"]
    forward = [op(*one, phase="forward") for one in projections]
    attention = op("attention", "flash", shape=(1, 1, 1, 1, 1, 1, 0, 1))
    trace = step(
        *forward,
        attention._replace(phase="forward"),
        op("gemm", "out", phase="forward"),
        op("gemm", "of the layer above"),
        *(op(*one) for one in projections),
        attention,
        op("gemm", "out"),
    )
    backward = [
        one for one in as_xla_runs(Row({"notes": notes}), trace).micro_batches[0] if one.phase == "backward"
    ]
    assert [one.name for one in backward if one.name in "qkv"] == ["q", "k", "v"][:count]
    assert backward[0].name == "of the layer above"


UPDATE = op("optimizer", "_fused_adamw_", ((1, 800), (2, 800), (3, 800), (4, 800)), phase="optimizer")


@pytest.mark.parametrize(
    ("engine", "notes", "moved", "sent_bytes"),
    [
        ("nemo", "distributed optimizer", 400, [4 * MIB]),
        ("nanotron/zero1", "", 400, [2 * MIB, 800]),
        ("internevo/zero1", "optimizer sharded over 2 ranks (ZeRO-1)", 800, [4 * MIB]),
        ("other/ddp", "ZeRO-1 from 760m on", None, [4 * MIB]),
    ],
)
def test_zero_1_updates_a_part_of_the_weights_in_float32(
    engine: str, notes: str, moved: int | None, sent_bytes: list[int]
) -> None:
    """400 bfloat16 weights on four replicas."""
    row = Row({"engine": engine, "notes": notes, "gpus": "4", "dp_replicate": "4"})
    summed = op("collective", "allreduce_", event=sent("all_reduce", "dp_replicate", "fsdp"))
    found = with_sharded_update(row, step(summed, end=(UPDATE,), memory={"8 optimizer/optimizer": 1600}))
    update = found.end[0]
    assert [size for _, size in update.reads] == [moved or 800] * 4
    assert found.memory["8 optimizer/optimizer"] == (400 * 12 * (moved or 0) // 1600 or 1600)
    events = [one.event for one in (*found.micro_batches[0], *found.end) if one.event]
    assert [event.tensor_bytes for event in events] == sent_bytes


def test_replicated_weights_are_not_cast_to_float8_in_each_micro_batch() -> None:
    forward = step(
        op("other", "norm", ((1, 64),), ((2, 64),), "forward"),
        op("gemm", "mm", ((2, 64), (3, 64)), ((4, 64),), "forward", shape=(1, 8, 8, 8)),
    )
    row = Row({"engine": "other", "compute_dtype": "fp8", "vocab": "64", "compile": "1", "gpu": "H100"})
    casts = [one for one in as_engine_runs(row, forward).micro_batches[0] if one.name == "to_float8"]
    assert len(casts) == 1
