"""A cluster file's numbers for this machine's CPU: a device is one thread of it.

Rates of matmuls, of what is elementwise and of the optimizer come from the ops of real steps, whose caches are as cold
and whose memory is as fresh as in training; attention by length, copies and gloo from themselves. Processor time where
one rank works alone, so that other load on the machine does not count; wall time of collectives.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tpresearch.calibrate.steps import FULL, TINY, StepTimes, time_steps
from tpresearch.config.world import World, usable_cores
from tpresearch.ledger.entries import Event
from tpresearch.parallel.device import CPU
from tpresearch.parallel.group import process_group
from tpresearch.simulate.cluster import LENGTHS
from tpresearch.simulate.network import copied_by_gloo, ring_passes
from tpresearch.simulate.prices import COPIES, moved_bytes
from tpresearch.simulate.trace import Op
from tpresearch.verify.ranks import Ranks

REPEATS = 5
MEASURED_LENGTHS = LENGTHS[:5]
"""Lengths at which attention is measured; longer ones are assumed to run at the last one's rate."""
SMALL_OP_BYTES = 1 << 18
"""An op that moves no more bytes than this takes as long as any small op."""


def measure_cpu() -> dict[str, Any]:
    """Every number of a cluster, for one thread of this CPU."""
    steps: dict[str, StepTimes] = {}
    for plan in ("fsdp", "tp", "sp"):
        print(f"  steps of two ranks, parallel={plan}", flush=True)
        steps[plan] = Ranks().run(2, time_steps, plan, FULL)[0]
    print("  matmuls, attention and gloo by themselves", flush=True)
    step = _rates(steps["fsdp"].ops)
    alone = {dtype: _matmul_flops(dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64)}
    flops = {dtype: rate / alone[torch.float32] * step.flops for dtype, rate in alone.items()}
    # Tables are for bfloat16, and others follow their matmuls: what is measured is float32.
    of_table = flops[torch.bfloat16] / flops[torch.float32] / 1e12
    forward, backward = zip(*(_attention_flops(length, 128) for length in MEASURED_LENGTHS), strict=True)
    narrow = _attention_flops(MEASURED_LENGTHS[1], 16)[1] / backward[1]
    cores = usable_cores()
    # No core is idle among so many, as in a training step; how fast idle ones wake up for two varies threefold.
    ranks = max(4, 2 * cores)
    gloo, crowd = (Ranks().run(count, _gloo, step.copies)[0] for count in (2, ranks))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    return {
        "memory_gb": memory / max(cores, 1),
        "memory_reserved_gb": 0.3,
        **{f"peak_tflops_{str(dtype).removeprefix('torch.')}": rate / 1e12 for dtype, rate in flops.items()},
        "compute_units": 1,
        "gemm_efficiency": 1.0,
        "gemm_half_depth": _half_depth(alone[torch.float32]),
        "bandwidth_gb_s": step.elementwise / 1e9,
        "bandwidth_efficiency": 1.0,
        "optimizer_efficiency": step.optimizer / step.elementwise,
        "copy_efficiency": step.copies / step.elementwise,
        "attention_tflops_forward": [rate * of_table for rate in _extend_to_lengths(forward)],
        "attention_tflops_backward": [rate * of_table for rate in _extend_to_lengths(backward)],
        "attention_narrow_heads": narrow ** (1 / 3),  # from 128 to 16 are three halvings
        "kernel_us": 0.0,
        **_host_times(steps),
        "intra_gb_s": gloo.bytes_s / 1e9,
        "intra_step_us": crowd.step_s * cores / ranks * 1e6,
        "inter_gb_s": gloo.bytes_s / 1e9,
        "inter_efficiency": 1.0,
        "inter_step_us": 0.0,
        "collective_us": 0.0,
        "overlap_slowdown": gloo.core_share,
        "scale_slowdown": _wait_share(steps.values(), gloo),
    }


def _extend_to_lengths(rates: Sequence[float]) -> list[float]:
    return [*rates, *[rates[-1]] * (len(LENGTHS) - len(rates))]


class Rates(NamedTuple):
    """Rates of the ops of a float32 step, with two ranks that share the caches and memory of the cores."""

    flops: float
    """FLOP/s of its matmuls."""
    elementwise: float
    """Bytes/s of its ops on activations, as prices count them."""
    copies: float
    """Bytes/s of FSDP's copies, into newly allocated memory."""
    optimizer: float


def _rates(ops: list[tuple[Op, float]]) -> Rates:
    least = min(taken for op, taken in ops if op.kind == "other")

    def rate(some: list[tuple[Op, float]], work: Callable[[Op], float]) -> float:
        return sum(work(op) for op, _ in some) / sum(taken - least for _, taken in some)

    def of_kind(kind: str) -> list[tuple[Op, float]]:
        return [(op, taken) for op, taken in ops if op.kind == kind]

    others = [(op, taken) for op, taken in of_kind("other") if moved_bytes(op) > SMALL_OP_BYTES]
    return Rates(
        rate(of_kind("gemm"), lambda op: 2.0 * math.prod(op.shape)),
        rate([one for one in others if one[0].name not in COPIES], moved_bytes),
        rate([one for one in others if one[0].name in COPIES], moved_bytes),
        rate(of_kind("optimizer"), moved_bytes),
    )


def _seconds(work: Callable[[], object]) -> float:
    """Processor time of one call: the minimum of several, since interruptions only add."""
    work()
    found = []
    for _ in range(REPEATS):
        before = time.process_time()
        work()
        found.append(time.process_time() - before)
    return min(found)


def _matmul_flops(dtype: Any, depth: int = 768) -> float:
    """At the shapes of llama2_small: 1,024 tokens, width 768 to 2,048."""
    a, b = torch.randn(1024, depth, dtype=dtype), torch.randn(depth, 2048, dtype=dtype)
    return 2 * 1024 * 2048 * depth / _seconds(lambda: a @ b)


def _half_depth(rate: float) -> float:
    """From the rate at a short inner dim: t = 2 m n (k + half) / rate."""
    short = _matmul_flops(torch.float32, 64)
    return max(0.0, 64 * (rate / short - 1))


def _attention_flops(length: int, width: int) -> tuple[float, float]:
    """FLOP/s forward and backward of causal attention, as prices count them."""
    heads, rows = 512 // width, max(1, 1024 // length)
    q, k, v = (torch.randn(rows, heads, length, width, requires_grad=True) for _ in range(3))
    flops = 4 * rows * heads * length * length * width / 2

    def attend() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    gradient = torch.randn(rows, heads, length, width)
    forward = _seconds(attend)
    both = _seconds(lambda: torch.autograd.grad(attend(), (q, k, v), gradient))
    return flops / forward, 2.5 * flops / max(both - forward, 1e-9)


def _host_times(steps: dict[str, StepTimes]) -> dict[str, float]:
    """Per op, per collective of FSDP, and per collective of a sharding rule with DTensor's dispatch around it."""
    tiny = Ranks().run(1, time_steps, "none", TINY)[0]
    launch = tiny.step_s / len(tiny.ops)

    def per_collective(issuer: str, *plans: str) -> float:
        more = sum(max(0.0, steps[plan].host_s - len(steps[plan].ops) * launch) for plan in plans)
        return more / sum(steps[plan].count(issuer) for plan in plans)

    return {
        "launch_us": launch * 1e6,
        "collective_host_us": per_collective("fsdp", "fsdp") * 1e6,
        "tensor_host_us": per_collective("dtensor", "tp", "sp") * 1e6,
    }


class Link(NamedTuple):
    """A link between ranks."""

    bytes_s: float
    """Bus bandwidth of large collectives."""
    step_s: float
    """Time of a ring step that sends almost nothing."""
    core_share: float
    """Share of its core that a rank uses in a large one."""
    copying: float
    """Bytes/s of copies, such as those into and out of gloo's buffers."""

    def seconds(self, event: Event) -> float:
        """Time of a collective of two ranks: one step per round."""
        step_s = self.step_s + event.tensor_bytes / 2 / self.bytes_s
        copied_s = copied_by_gloo(event.collective, event.tensor_bytes) / self.copying
        return ring_passes(event.collective, by_gloo=True) * step_s + copied_s


def _wait_share(steps: Iterable[StepTimes], link: Link) -> float:
    """Time that ranks wait for the slowest one, as a share of their own work, apart from their collectives."""
    found = []
    for step in steps:
        sent = sum(link.seconds(op.event) for op, _ in step.ops if op.event)
        sent -= sum(seconds for op, seconds in step.ops if op.event)  # which the main thread itself works on
        found.append((step.wall_s - sent) / step.step_s - 1)
    return max(0.0, median(found))


SMALL, LARGE = 1 << 10, 1 << 20
"""Numbers of a small and a large tensor."""


def _gloo(world: World, copying: float) -> Link:
    """Measure gloo's collectives: the median wall time of many, with nothing running beside them.

    Args:
        copying: bytes/s of copies.
    """
    torch.set_num_threads(1)

    def all_reduce(count: int) -> None:
        dist.all_reduce(torch.ones(count))

    def all_gather(count: int) -> None:
        dist.all_gather_into_tensor(torch.empty(count), torch.ones(count // world.size))

    def reduce_scatter(count: int) -> None:
        dist.reduce_scatter_tensor(torch.empty(count // world.size), torch.ones(count))

    def seconds(collective: Callable[[int], None], count: int) -> tuple[float, float]:
        found = []
        for _ in range(60):
            dist.barrier()
            wall, processor = time.perf_counter(), time.process_time()
            collective(count)
            found.append((time.perf_counter() - wall, time.process_time() - processor))
        return median(wall for wall, _ in found[2:]), median(processor for _, processor in found[2:])

    collectives = (all_reduce, all_gather, reduce_scatter)
    with process_group(CPU, world):
        least = sum(seconds(one, SMALL)[0] for one in collectives)
        walls, processor = zip(*(seconds(one, LARGE) for one in collectives), strict=True)
    names = [one.__name__ for one in collectives]
    steps = sum(ring_passes(name, by_gloo=True) for name in names) * (world.size - 1)
    moved = steps * LARGE * 4 / world.size
    copied_s = sum(copied_by_gloo(name, LARGE * 4) for name in names) / copying
    sent_s = sum(walls) - least - copied_s
    return Link(moved / sent_s, least / steps, min(1.0, sum(processor) / sum(walls)), copying)
