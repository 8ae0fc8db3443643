"""Times of single ops, for the simulator: rows of {op, shape, dtype, us, flops, bytes}, the most needed first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from gpu.rows import Stage
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tpresearch.calibrate.cuda import (
    LOAD_SIZE,
    forward_and_backward,
    hundred_launches,
    lead_matrix,
    microseconds,
    random,
    us_under_load,
)
from tpresearch.models.llama2 import rotary_table, rotate

Case = tuple[str, tuple[int, ...], float, float, Callable[[], Any]]
"""(op, shape, FLOPs, bytes read and written, what to call)"""

FULL = {
    "tokens": (8192, 4096, 16384),
    # (out, in) of the projections of Llama-3-8B and Llama2-7B
    "weights": (
        (14336, 4096),
        (4096, 14336),
        (4096, 4096),
        (1024, 4096),
        (11008, 4096),
        (128256, 4096),
        (32000, 4096),
    ),
    "attention": (
        (2, 32, 8, 4096, 128),
        (4, 32, 8, 4096, 128),
        (2, 32, 32, 4096, 128),
        (1, 32, 8, 8192, 128),
    ),
    "width": 4096,
    "head_dim": 128,
    "hidden": 14336,
    "parameters": 200_000_000,
    "copied": 2**30,
}
TINY = {
    "tokens": (32,),
    "weights": ((48, 32),),
    "attention": ((1, 4, 2, 16, 8),),
    "width": 32,
    "head_dim": 8,
    "hidden": 48,
    "parameters": 1000,
    "copied": 2**12,
}


def main() -> None:
    stage, _ = Stage.from_arguments("calibrate")
    sizes: dict[str, Any] = TINY if stage.tiny else FULL
    lead = lead_matrix(stage.device) if stage.on_cuda else None
    for cases in (elementwise, memory, launches, attention, matmuls):
        for op, shape, flops, moved, call in cases(sizes, stage.device):
            if stage.left() < 3:
                stage.add(cut_short=op)
                return
            try:
                us = timed(call, stage, None if cases is launches else lead)
            except RuntimeError as error:
                stage.add(op=op, shape=shape, error=str(error).splitlines()[0][:200])
                continue
            stage.add(op=op, shape=shape, dtype="bfloat16", us=us, flops=flops, bytes=moved)
    if lead is not None and stage.left() > 8:
        us = us_under_load(partial(torch.matmul, lead, lead))
        about = {"op": "matmul sustained", "shape": (LOAD_SIZE,) * 3, "dtype": "bfloat16"}
        stage.add(**about, us=us, flops=2.0 * LOAD_SIZE**3, bytes=0.0)


def timed(call: Callable[[], Any], stage: Stage, lead: Tensor | None) -> float:
    """Median microseconds of a call, after some to warm up; on a GPU of its kernels alone, where the host can be ahead."""
    if stage.on_cuda:
        return microseconds(call, lead)
    found = []
    for _ in range(6):
        began = time.perf_counter()
        call()
        found.append((time.perf_counter() - began) * 1e6)
    return statistics.median(found[3:])


def matmuls(sizes: dict[str, Any], device: torch.device) -> Iterator[Case]:
    """Of each projection: forward x W^T, the input's gradient g W, the weight's gradient g^T x."""
    for tokens in sizes["tokens"]:
        for out, width in sizes["weights"]:
            x, w, g = (
                random(*shape, device=device) for shape in ((tokens, width), (out, width), (tokens, out))
            )
            flops, moved = 2.0 * tokens * out * width, 2.0 * (tokens * width + out * width + tokens * out)
            shape = (tokens, out, width)
            yield "matmul NT", shape, flops, moved, partial(torch.matmul, x, w.t())
            yield "matmul NN", shape, flops, moved, partial(torch.matmul, g, w)
            yield "matmul TN", shape, flops, moved, partial(torch.matmul, g.t(), x)


def attend(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def attention(sizes: dict[str, Any], device: torch.device) -> Iterator[Case]:
    fast = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    backends = fast if device.type == "cuda" else [SDPBackend.MATH]
    for b, n, k, s, d in sizes["attention"]:
        for backend in backends:
            q, key, value = (random(b, heads, s, d, device=device).requires_grad_() for heads in (n, k, k))

            forward = partial(attend, backend, q, key, value)
            both = partial(forward_and_backward, forward, (q, key, value))
            flops, moved = 2.0 * b * n * s * s * d, 2.0 * b * s * d * (2 * n + 2 * k)
            shape = (b, n, k, s, d)
            yield f"attention forward {backend.name}", shape, flops, moved, forward
            yield f"attention forward and backward {backend.name}", shape, 3.5 * flops, 3 * moved, both


def elementwise(sizes: dict[str, Any], device: torch.device) -> Iterator[Case]:
    """Norm, SwiGLU and rotary positions, eager and compiled."""
    tokens, h, f = sizes["tokens"][0], sizes["width"], sizes["hidden"]
    x, weight = random(tokens, h, device=device), random(h, device=device)
    a, b = random(tokens, f, device=device), random(tokens, f, device=device)
    d = sizes["head_dim"]
    heads = random(1, tokens, h // d, d, device=device)
    table = rotary_table(d, tokens, 1e4).to(device)
    functions: list[tuple[str, int, int, Callable[..., Tensor], tuple[Tensor, ...]]] = [
        ("rmsnorm", h, 4, lambda x, w: F.rms_norm(x, (h,), w, 1e-5), (x, weight)),
        ("swiglu", f, 6, lambda a, b: F.silu(a) * b, (a, b)),
        ("rotary", h, 4, rotate, (heads, table)),
    ]
    for name, width, bytes_each, function, given in functions:
        shape, moved = (tokens, width), float(bytes_each * tokens * width)
        yield f"{name} eager", shape, 0.0, moved, partial(function, *given)
        if device.type == "cuda":
            compiled = torch.compile(function, dynamic=False)
            yield f"{name} compiled", shape, 0.0, moved, partial(compiled, *given)


def memory(sizes: dict[str, Any], device: torch.device) -> Iterator[Case]:
    """Copies, and the fused AdamW on bfloat16 and on float32 weights."""
    size, pinned_size = sizes["copied"], sizes["copied"] // 16
    source, into = (torch.empty(size, dtype=torch.uint8, device=device) for _ in range(2))
    yield "copy", (size,), 0.0, 2.0 * size, lambda: into.copy_(source)
    if device.type == "cuda":
        pinned = torch.empty(pinned_size, dtype=torch.uint8, pin_memory=True)
        copy = partial(source[:pinned_size].copy_, pinned, non_blocking=True)
        yield "copy to device", (pinned_size,), 0.0, float(pinned_size), copy
    count = sizes["parameters"]
    for dtype, moved in ((torch.bfloat16, 14.0), (torch.float32, 28.0)):
        parameter = torch.nn.Parameter(torch.randn(count, device=device, dtype=dtype))
        parameter.grad = torch.randn_like(parameter)
        optimizer = torch.optim.AdamW([parameter], fused=True)
        yield f"adamw {dtype}".replace("torch.", ""), (count,), 0.0, moved * count, optimizer.step


def launches(sizes: dict[str, Any], device: torch.device) -> Iterator[Case]:
    yield "100 launches", (1,), 0.0, 0.0, hundred_launches(device)


if __name__ == "__main__":
    main()
