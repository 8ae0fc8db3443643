"""Measurements of single ops on this machine's first GPU, in the format that `rows` reads; they take a minute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, WIDTH, HIDDEN = 8192, 4096, 14336
"""Sizes of the matmuls: a large micro-batch of an 8B model."""
PARAMETERS = 200_000_000
"""Number of parameters that AdamW updates."""
LOAD_S = 5.0
"""How long a matmul runs until the power limit has set the clock."""
REPEATS = 20


def measure_gpu(device: str = "cuda") -> list[dict[str, Any]]:
    """Rows of {op, shape, us, flops, bytes}, and one that names the card."""
    rows = [_card(device)]
    for op, shape, flops, moved, call in (*_matmuls(device), *_attention(device), *_memory(device)):
        rows.append({"op": op, "shape": shape, "us": _us(call), "flops": flops, "bytes": moved})
    return [*rows, _sustained(device)]


Case = tuple[str, tuple[int, ...], float, float, Callable[[], object]]
"""(op, shape, FLOPs, bytes read and written, what to call)"""


def _card(device: str) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(device)
    return {"card": found.name, "memory_bytes": found.total_memory, "torch": torch.__version__}


def _matmuls(device: str) -> Iterator[Case]:
    for rows, columns, depth in ((TOKENS, HIDDEN, WIDTH), (TOKENS, WIDTH, HIDDEN), (TOKENS, WIDTH, WIDTH)):
        a, b = _random(rows, depth, device=device), _random(columns, depth, device=device)
        shape = rows, columns, depth
        yield "matmul NT", shape, 2.0 * rows * columns * depth, 0.0, partial(torch.matmul, a, b.t())


def _attention(device: str) -> Iterator[Case]:
    for rows, length in ((8, 1024), (2, 4096)):
        q, k, v = (_random(rows, 32, length, 128, device=device).requires_grad_() for _ in range(3))

        def forward(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        def both(forward: Callable[[], Tensor] = forward, given: tuple[Tensor, ...] = (q, k, v)) -> None:
            out = forward()
            # Not `backward`, which would add each call's gradients to the last one's
            torch.autograd.grad(out, given, out)

        flops, shape = 2.0 * rows * 32 * length * length * 128, (rows, 32, 32, length, 128)
        yield "attention forward", shape, flops, 0.0, forward
        yield "attention forward and backward", shape, 3.5 * flops, 0.0, both


def _memory(device: str) -> Iterator[Case]:
    source, into = (torch.empty(2**30, dtype=torch.uint8, device=device) for _ in range(2))
    yield "copy", (2**30,), 0.0, 2.0**31, lambda: into.copy_(source)
    parameter = torch.nn.Parameter(torch.zeros(PARAMETERS, device=device))
    parameter.grad = torch.zeros_like(parameter)
    yield (
        "adamw float32",
        (PARAMETERS,),
        0.0,
        28.0 * PARAMETERS,
        torch.optim.AdamW([parameter], fused=True).step,
    )
    one = torch.zeros(1, device=device)

    def launches() -> None:
        for _ in range(100):
            one.add_(1)

    yield "100 launches", (1,), 0.0, 0.0, launches


def _sustained(device: str) -> dict[str, Any]:
    a, b = (_random(8192, 8192, device=device) for _ in range(2))
    began = time.monotonic()
    while time.monotonic() - began < LOAD_S:
        us = _us(lambda: a @ b)
    return {"op": "matmul sustained", "shape": (8192,) * 3, "us": us, "flops": 2.0 * 8192**3, "bytes": 0.0}


def _us(call: Callable[[], object]) -> float:
    """The median of some calls, by events on the device."""
    for _ in range(3):
        call()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return median(marks[i].elapsed_time(marks[i + 1]) * 1e3 for i in range(REPEATS))


def _random(*shape: int, device: str) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)
