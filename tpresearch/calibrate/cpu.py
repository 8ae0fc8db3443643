"""A cluster file's numbers for this machine's CPU: a device is one thread of it.

Matmuls, attention, memory bandwidth, the time of an op, and gloo between two ranks; in processor time where one rank
works alone, so that what else the machine does is left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from tpresearch.config.world import World

REPEATS = 5
LENGTHS = (512, 1024)
"""Of attention; longer ones are taken to run as the last."""


def measured() -> dict[str, Any]:
    """Every number of a cluster, for one thread of this CPU."""
    import torch

    flops = {
        str(dtype).removeprefix("torch."): _matmul_flops(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
    }
    forward, backward = zip(*(_attention_flops(length) for length in LENGTHS), strict=True)
    fill = [1] * (6 - len(LENGTHS))
    ops = _op_times()
    gloo = _gloo()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    cores = len(os.sched_getaffinity(0))
    return {
        "memory_gb": memory / max(cores, 1),
        "memory_reserved_gb": 0.3,
        **{f"peak_tflops_{dtype}": rate / 1e12 for dtype, rate in flops.items()},
        "compute_units": 1,
        "gemm_efficiency": 1.0,
        "gemm_half_depth": _half_depth(flops["float32"]),
        "bandwidth_gb_s": _bandwidth() / 1e9,
        "bandwidth_efficiency": 1.0,
        "optimizer_efficiency": 1.0,
        "attention_tflops_forward": [
            *(rate / 1e12 for rate in forward),
            *(forward[-1] / 1e12 * one for one in fill),
        ],
        "attention_tflops_backward": [
            *(rate / 1e12 for rate in backward),
            *(backward[-1] / 1e12 * one for one in fill),
        ],
        "attention_narrow_heads": 1.0,
        "kernel_us": 0.0,
        **ops,
        "intra_gb_s": gloo[0] / 1e9,
        "intra_step_us": 0.0,
        "inter_gb_s": gloo[0] / 1e9,
        "inter_efficiency": 1.0,
        "inter_step_us": 0.0,
        "collective_us": gloo[1] * 1e6,
        "overlap_slowdown": 0.0,
        "scale_slowdown": 0.0,
    }


def _seconds(work: Callable[[], object]) -> float:
    """Processor time of one call, the least of some: interruptions only add."""
    work()
    found = []
    for _ in range(REPEATS):
        before = time.process_time()
        work()
        found.append(time.process_time() - before)
    return min(found)


def _matmul_flops(dtype: Any, depth: int = 768) -> float:
    """At the shapes of llama2_small: 1,024 tokens, width 768 to 2,048."""
    import torch

    a, b = torch.randn(1024, depth, dtype=dtype), torch.randn(depth, 2048, dtype=dtype)
    return 2 * 1024 * 2048 * depth / _seconds(lambda: a @ b)


def _half_depth(rate: float) -> float:
    """From the rate at a short inner dim: t = 2 m n (k + half) / rate."""
    import torch

    short = _matmul_flops(torch.float32, 64)
    return max(0.0, 64 * (rate / short - 1))


def _attention_flops(length: int) -> tuple[float, float]:
    """FLOP/s forward and backward of causal attention, as prices count them."""
    import torch
    import torch.nn.functional as F

    q, k, v = (torch.randn(1, 8, length, 64, requires_grad=True) for _ in range(3))
    flops = 4 * 8 * length * length * 64 / 2

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    forward = _seconds(attend)
    both = _seconds(lambda: attend().sum().backward())
    return flops / forward, 2.5 * flops / max(both - forward, 1e-9)


def _bandwidth() -> float:
    """Bytes/s of an elementwise product of a few megabytes, as a block's activations are."""
    import torch

    a, b, out = (torch.randn(1 << 20) for _ in range(3))
    return 3 * 4 * (1 << 20) / _seconds(lambda: torch.mul(a, b, out=out))


def _op_times() -> dict[str, float]:
    """Host time per op and per collective: real steps of a tiny model whose ops do next to nothing, on a fake group."""
    alone, ops, _ = _tiny_step("none", 1)
    launch = alone / ops
    fsdp, more, sent = _tiny_step("fsdp", 2)
    sharded, tensor_ops, tensor_sent = _tiny_step("sp", 2)
    return {
        "launch_us": launch * 1e6,
        "collective_host_us": max(0.0, (fsdp - more * launch) / max(sent, 1)) * 1e6,
        "tensor_host_us": max(0.0, (sharded - tensor_ops * launch) / max(tensor_sent, 1)) * 1e6,
    }


def _tiny_step(plan: str, world: int) -> tuple[float, int, int]:
    """Processor time of a step, and how many ops and collectives it has."""
    from tpresearch.api import load
    from tpresearch.data.pipeline import prepare
    from tpresearch.parallel.group import process_group
    from tpresearch.parallel.mesh import build_mesh
    from tpresearch.simulate.fake_step import FAKE, record
    from tpresearch.train.assemble import assemble
    from tpresearch.train.preflight import preflight

    cfg = load("model=llama2_debug", "model.n_layers=4", f"parallel={plan}", *_TINY)
    ranks = World(size=world, local_size=world)
    job = preflight(cfg, ranks)
    ops = record(cfg, job.sizes).ops(1)
    with process_group(FAKE, ranks):
        loop = assemble(job, build_mesh(job.sizes, FAKE.type), FAKE, prepare(cfg.data, cfg.tokenizer))
        return (
            _seconds(loop.step),
            sum(op.kind != "wait" for op in ops),
            sum(op.event is not None for op in ops),
        )


_TINY = (
    "data=random_tokens",
    "logger=none",
    "tokenizer.vocab_size=260",
    "data.seq_len=8",
    "train.global_batch_size=2",
)


def _gloo() -> tuple[float, float]:
    """Bus bandwidth in bytes/s, and the least time of a collective, of two ranks."""
    from tpresearch.verify.ranks import Ranks

    small, large = Ranks().run(2, _all_reduces)[0]
    return 2 * LARGE * 4 / 2 / max(large - small, 1e-9), small


LARGE = 1 << 20
"""Numbers of a large all-reduce."""


def _all_reduces(world: World) -> tuple[float, float]:
    """Wall time of an all-reduce of one number, and of `LARGE`: the least of many, since others interrupt."""
    import torch
    import torch.distributed as dist

    from tpresearch.parallel.device import Device
    from tpresearch.parallel.group import process_group

    torch.set_num_threads(1)
    found = []
    with process_group(Device(torch.device("cpu"), "gloo", "cpu"), world):
        for count in (1, LARGE):
            tensor, times = torch.ones(count), []
            for _ in range(30):
                dist.barrier()
                before = time.perf_counter()
                dist.all_reduce(tensor)
                times.append(time.perf_counter() - before)
            found.append(min(times))
    return found[0], found[1]
