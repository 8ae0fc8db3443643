"""On CUDA: every plan computes what one CPU process does, sends what the formulas say, and is counted by the allocator.

Where ranks are more than GPUs, they share them. The cheapest tests come first, then those that cover most.
"""

from __future__ import annotations

import pytest
import torch
from support.composed import config, corpus, in_two_parts
from support.counted_steps import count
from support.traces import PLANS

from tpresearch.config import Config
from tpresearch.config.schema import Dtype
from tpresearch.config.world import World
from tpresearch.parallel.device import Device
from tpresearch.parallel.summed_gradients import add_product_
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.reference import reference
from tpresearch.verify.trace import RunTrace, compare, out_of_tolerance, trace_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.xdist_group("one card"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
SETTINGS = ("train.clip_grad_norm=0.2", "schedule.warmup_steps=1", "train.eval_rows=11", "optimizer=sgd")


def traced(world: World, cfg: Config) -> RunTrace | None:
    found = trace_run(cfg, corpus(), world, 3)
    return found if world.rank == 0 else None


def agree(ours: RunTrace, plan: str, model: str, dtype: Dtype, *words: str) -> None:
    alone = config(f"model={model}", "parallel=none", "device=cpu", *SETTINGS, f"train.dtype={dtype}", *words)
    assert out_of_tolerance(compare(ours, reference(alone, corpus(), 3)), dtype) == [], plan


@pytest.mark.parametrize("plan", ["none", "tp", "fsdp", "fsdp_tp"])
def test_a_step_sends_and_holds_what_formulas_say(plan: str) -> None:
    """As rank 0 of four that are not there: collectives return at once, and all else runs on the card."""
    size = 1 if plan == "none" else 4
    card = Device(torch.device("cuda", 0), "fake", "cuda")
    found = count(World(size=size, local_size=size), config("model=llama2_debug", f"parallel={plan}"), card)
    assert found.sent == found.expected.sent
    held = {kind.kind: kind for kind in found.held}
    for kind in ("parameters", "gradients", "optimizer"):
        assert held[kind].most_bytes == found.expected.held[kind], kind
    assert held["activations"].most_bytes == pytest.approx(found.expected.held["activations"], rel=0.02)
    peak = sum(kind.at_peak_bytes for kind in found.held)
    assert found.allocator_peak_bytes is not None
    assert found.allocator_peak_bytes >= peak  # it rounds up, and has what ops use inside


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_matmul_adds_to_a_sum_that_may_be_wider(dtype: torch.dtype) -> None:
    """Integers below 2^8 are numbers of any of these dtypes (TF32 too), and so are sums of their products of float32. A sum
    in bfloat16 may be of a product that was rounded before, or of two such parts."""
    first, second = (torch.randint(-255, 256, shape) for shape in ((96, 160), (160, 64)))
    for of_sum in {torch.promote_types(dtype, torch.float32), dtype}:
        total = torch.ones(96, 64, dtype=of_sum, device="cuda")
        for begun in (True, False):
            factors = first.t().contiguous().cuda().to(dtype).t(), second.cuda().to(dtype)
            add_product_(total, *factors, torch.tensor(begun))
            exact = begun + first @ second
            most = 0 if of_sum.itemsize > 2 else exact.abs().max() / 2**8
            assert (total.cpu() - exact).abs().max() <= most, (of_sum, begun)


@pytest.mark.parametrize("plan", PLANS[::-1])  # those of most axes first
@pytest.mark.parametrize("model", ["llama2_debug", "toy_mlp"])
def test_a_plan_computes_what_one_cpu_process_does(ranks: Ranks, plan: str, model: str) -> None:
    cfg = config(f"model={model}", f"parallel={plan}", "device=cuda", *SETTINGS, "train.dtype=float64")
    agree(ranks.run(4, traced, in_two_parts(cfg, 4))[0], plan, model, Dtype.float64)


@pytest.mark.parametrize("kind", ["none", "selective", "full", "budget"])
def test_sums_that_matmuls_add_to_are_the_gradients(ranks: Ranks, kind: str) -> None:
    fused = (
        "parallel.gradient_accumulation_fusion=true",
        "train.micro_batch_size=4",
        "parallel.compile=true",
    )
    settings = (*fused, f"parallel.activation_checkpointing={kind}", *SETTINGS, "train.dtype=float64")
    heads = "model.n_kv_heads=8"  # torch 2.11 has no budget for shared ones
    cfg = config("model=llama2_debug", heads, "parallel=none", "device=cuda", *settings)
    agree(ranks.run(1, traced, cfg)[0], "none", "llama2_debug", Dtype.float64, heads)


def test_split_master_weights_are_trained_as_whole_ones(ranks: Ranks) -> None:
    updates = "optimizer=adamw", "optimizer.compile=true", "optimizer.moment_dtype=bfloat16"
    fused = "parallel.gradient_accumulation_fusion=true", "train.micro_batch_size=4"
    words = "model=llama2_debug", "parallel=none", "device=cuda", "train.dtype=bfloat16", *updates, *fused
    ours, whole = (
        ranks.run(1, traced, config(*words, f"optimizer.split_masters={splits}"))[0]
        for splits in (True, False)
    )
    assert out_of_tolerance(compare(ours, whole), Dtype.bfloat16) == []


@pytest.mark.parametrize("plan", ["fsdp_tp", "sp"])
def test_compiled_blocks_on_ranks_compute_the_same(ranks: Ranks, plan: str) -> None:
    settings = ("parallel.compile=true", *SETTINGS, "train.dtype=float64")
    cfg = config("model=llama2_debug", f"parallel={plan}", "device=cuda", *settings)
    agree(ranks.run(4, traced, in_two_parts(cfg, 4))[0], plan, "llama2_debug", Dtype.float64)


@pytest.mark.parametrize("plan", ["fsdp", "sp", "fsdp_tp"])
def test_in_bfloat16_to_rounding(ranks: Ranks, plan: str) -> None:
    cfg = config("model=llama2_debug", f"parallel={plan}", "device=cuda", *SETTINGS, "train.dtype=bfloat16")
    agree(ranks.run(4, traced, cfg)[0], plan, "llama2_debug", Dtype.bfloat16)


def test_weights_that_wait_in_host_memory_are_trained_the_same(ranks: Ranks) -> None:
    settings = ("parallel.fsdp.cpu_offload=true", *SETTINGS, "train.dtype=float64")
    cfg = config("model=llama2_debug", "parallel=fsdp_tp", "device=cuda", *settings)
    agree(ranks.run(4, traced, in_two_parts(cfg, 4))[0], "fsdp_tp", "llama2_debug", Dtype.float64)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl needs two CUDA devices")
def test_over_nccl(ranks: Ranks) -> None:
    cfg = config("model=llama2_debug", "parallel=fsdp", "device=cuda", *SETTINGS, "train.dtype=float64")
    agree(ranks.run(2, traced, cfg)[0], "fsdp", "llama2_debug", Dtype.float64)
