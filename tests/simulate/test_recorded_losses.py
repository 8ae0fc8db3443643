"""What a step on a cluster of GPUs runs and holds where its code asks for the device, and where the loss is compiled."""

from __future__ import annotations

import dataclasses

import pytest
from support.composed import config

from tpresearch.config.schema import Config
from tpresearch.config.validate import validate
from tpresearch.launch.composition import read_option
from tpresearch.ledger.memory_formulas import expected_memory
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.simulate.device_memory import peak_moment
from tpresearch.simulate.fake_step import record
from tpresearch.simulate.kernels import kernels
from tpresearch.simulate.trace import Trace
from tpresearch.train.preflight import plan_model

VOCAB, TOKENS = 4096, 512
LOGITS = TOKENS * VOCAB


def on(cluster: str, *overrides: str) -> tuple[Config, Trace]:
    """A step of 512 tokens, all in one chunk of the loss."""
    small = (f"data.seq_len={TOKENS}", f"tokenizer.vocab_size={VOCAB}", "train.global_batch_size=1")
    plain = ("model=llama2_debug", "model.n_layers=1", "parallel=none", "train.dtype=bfloat16")
    cfg = config(*plain, *small, *overrides, small=False)
    cfg = dataclasses.replace(cfg, cluster=read_option("cluster", cluster))
    return cfg, record(cfg, validate(cfg, 1))


def held_by(trace: Trace, moment: str) -> float:
    """Bytes at its peak, without weights and what the optimizer has."""
    held = peak_moment({name: size for name, size in trace.memory.items() if name.startswith(moment)})
    return held["temporaries"] + held["activations"]


@pytest.mark.parametrize(
    ("cluster", "compile", "traffic", "held"),
    [
        ("h100_dgx", "false", 26, 6),
        ("h100_dgx", "true", 6, 4),
        ("cpu", "false", 34, 6),
        ("cpu", "true", 6, 4),
    ],
)
def test_the_loss_moves_and_holds_what_its_device_does(
    cluster: str, compile: str, traffic: int, held: int
) -> None:
    """Of each bfloat16 logit a GPU's eager ops read 2 bytes, 2, 4, 4 and 4, and write 4, 4 and 2; a CPU's write 4 last, and copy
    that to 2. Compiled ones read 2 twice and write 2. Held are the logits and a float32 copy, or their gradient.
    """
    cfg, trace = on(cluster, f"parallel.compile={compile}")
    (part,) = trace.micro_batches
    numbers = parse_cluster(cfg.cluster)
    rate = numbers["bandwidth_gb_s"] * 1e9 * numbers["bandwidth_efficiency"]
    launched = kernels(part, numbers, validate(cfg, 1), cfg.parallel.compile)
    matmul = next(
        place for place, one in enumerate(launched) if one.op.phase == "loss" and one.kind == "gemm"
    )
    moved = sum(
        (one.seconds - numbers["kernel_us"] * 1e-6) * rate
        for one in launched[matmul:]
        if one.op.phase == "loss" and one.kind == "elementwise"
    )
    assert moved / LOGITS == pytest.approx(traffic, rel=0.02)
    before = held_by(trace, "0 forward")
    assert (held_by(trace, "1 loss") - before) / LOGITS == pytest.approx(held, rel=0.1)


def test_heads_that_share_keys_in_float32_are_repeated_on_a_gpu_alone() -> None:
    """Four heads of keys and of values, 8 wide, become eight each, which attention keeps; on a CPU each of three norms, 64 wide,
    keeps its normalised input beside its input."""
    more = {
        cluster: held_by(on(cluster, "train.dtype=float32")[1], "0 forward")
        for cluster in ("h100_dgx", "cpu")
    }
    assert more["h100_dgx"] - more["cpu"] == (2 * 4 * 8 - 3 * 64) * TOKENS * 4


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
def test_a_gpu_keeps_what_the_formulas_say(dtype: str, kind: str) -> None:
    """Of a norm also its input in bfloat16, of which a CPU keeps a wider copy instead."""
    words = f"train.weights={dtype}", f"parallel.activation_checkpointing={kind}", "model.n_layers=2"
    cfg, trace = on("h100_dgx", f"train.dtype={dtype}", *words)
    expected = expected_memory(*plan_model(cfg, validate(cfg, 1)), cfg, "cuda")["activations"]
    assert max(size for name, size in trace.memory.items() if name.endswith("/activations")) == expected


def test_a_norm_is_one_kernel_on_a_gpu_and_many_on_a_cpu() -> None:
    def roots(cluster: str) -> int:
        cfg, trace = on(cluster, "train.dtype=float32")
        sizes, numbers = validate(cfg, 1), parse_cluster(cfg.cluster)
        found = kernels(trace.micro_batches[0], numbers, sizes, compiled=False)
        return sum(one.op.name == "rsqrt" for one in found)

    assert (roots("h100_dgx"), roots("cpu")) == (0, 3)  # a kernel has the name of its last op


def test_a_view_of_conjugates_is_no_kernel() -> None:
    """Rotary positions take the table's conjugates in backward: a view, and one copy of it."""
    _, trace = on("h100_dgx")
    backward = [op.name for op in trace.micro_batches[0] if op.phase == "backward" and op.element == 8]
    assert backward == ["clone", "mul"] * 2
