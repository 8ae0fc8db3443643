"""Measurements of single ops on this machine's first GPU, in the format that `rows` reads; they take half a minute."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TOKENS, WIDTH, HIDDEN = 8192, 4096, 14336
"""Sizes of the matmuls: a large micro-batch of an 8B model."""
HEADS, HEAD_DIM = 32, 128
ATTENTION = ((8, 1024), (2, 4096))
"""Rows and length of attention."""
PARAMETERS = 200_000_000
"""Number of parameters that AdamW updates."""
COPIED_BYTES = 2**30
LOAD_SIZE, LOAD_S = 8192, 5.0
"""Size of a square matmul, and how long it runs until the power limit has set the clock."""
REPEATS = 20


class Case(NamedTuple):
    """An op to measure."""

    op: str
    shape: tuple[int, ...]
    flops: float
    moved_bytes: float
    """Read and written."""
    prepare: Callable[[], Callable[[], object]]
    """Allocates the op's tensors, which live as long as what it returns: the call to time."""
    on_device: bool = True
    """Whether its kernels are timed; if not, the host that launches them."""


def measure_gpu(device: str = "cuda") -> list[dict[str, Any]]:
    """Rows of {op, shape, us, flops, bytes}, and one that names the card; each is printed as soon as it is measured.

    An op that fails, for example because other processes hold the memory, has a row with its error and no time.
    """
    rows = [_card(device)]
    lead = lead_matrix(device)
    cases = (*_matmuls(device), *_attention(device), *_memory(device))
    rows += [_measured(case, partial(microseconds, lead=lead if case.on_device else None)) for case in cases]
    multiply = partial(torch.matmul, lead, lead)
    load = Case("matmul sustained", (LOAD_SIZE,) * 3, 2.0 * LOAD_SIZE**3, 0.0, lambda: multiply)
    return [*rows, _measured(load, us_under_load)]


def _measured(case: Case, time_it: Callable[[Callable[[], object]], float]) -> dict[str, Any]:
    row: dict[str, Any] = {"op": case.op, "shape": case.shape}
    try:
        row |= {"us": time_it(case.prepare()), "flops": case.flops, "bytes": case.moved_bytes}
    except RuntimeError as error:  # of CUDA and of its libraries, out of memory among them
        row["error"] = str(error).partition("\n")[0]
    found = f"{row['us']:.1f} us" if "us" in row else f"failed: {row['error']}"
    print(f"  {case.op} {'x'.join(map(str, case.shape))}: {found}", flush=True)
    return row


def _card(device: str) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(device)
    return {"card": found.name, "memory_bytes": found.total_memory, "torch": torch.__version__}


def _matmuls(device: str) -> Iterator[Case]:
    def prepare(rows: int, columns: int, depth: int) -> Callable[[], object]:
        a, b = random(rows, depth, device=device), random(columns, depth, device=device)
        return partial(torch.matmul, a, b.t())

    for shape in ((TOKENS, HIDDEN, WIDTH), (TOKENS, WIDTH, HIDDEN), (TOKENS, WIDTH, WIDTH)):
        yield Case("matmul NT", shape, 2.0 * math.prod(shape), 0.0, partial(prepare, *shape))


def _attention(device: str) -> Iterator[Case]:
    def prepare(rows: int, length: int, backward: bool) -> Callable[[], object]:
        q, k, v = (random(rows, HEADS, length, HEAD_DIM, device=device).requires_grad_() for _ in range(3))
        forward = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        return partial(forward_and_backward, forward, (q, k, v)) if backward else forward

    for rows, length in ATTENTION:
        flops = 2.0 * rows * HEADS * length * length * HEAD_DIM
        shape = rows, HEADS, HEADS, length, HEAD_DIM
        yield Case("attention forward", shape, flops, 0.0, partial(prepare, rows, length, backward=False))
        both = partial(prepare, rows, length, backward=True)
        yield Case("attention forward and backward", shape, 3.5 * flops, 0.0, both)


def forward_and_backward(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...]) -> None:
    out = forward()
    # Not `backward`, which would add each call's gradients to the last one's
    torch.autograd.grad(out, inputs, out)


def _memory(device: str) -> Iterator[Case]:
    def copy() -> Callable[[], object]:
        source, into = (torch.empty(COPIED_BYTES, dtype=torch.uint8, device=device) for _ in range(2))
        return partial(into.copy_, source)

    def adamw() -> Callable[[], object]:
        parameter = torch.nn.Parameter(torch.randn(PARAMETERS, device=device))
        parameter.grad = torch.randn_like(parameter)
        return torch.optim.AdamW([parameter], fused=True).step

    yield Case("copy", (COPIED_BYTES,), 0.0, 2.0 * COPIED_BYTES, copy)
    yield Case("adamw float32", (PARAMETERS,), 0.0, 28.0 * PARAMETERS, adamw)
    launches = partial(hundred_launches, device)
    yield Case("100 launches", (1,), 0.0, 0.0, launches, on_device=False)


def hundred_launches(device: str | torch.device) -> Callable[[], object]:
    one = torch.zeros(1, device=device)

    def hundred() -> None:
        for _ in range(100):
            one.add_(1)

    return hundred


def us_under_load(call: Callable[[], object]) -> float:
    """The median of the second half of LOAD_S seconds."""
    until = time.monotonic() + LOAD_S
    taken: list[float] = []
    while not taken or time.monotonic() < until:
        taken.append(microseconds(call))
    return median(taken[len(taken) // 2 :])


def microseconds(call: Callable[[], object], lead: Tensor | None = None) -> float:
    """Median microseconds of a call, by events on the device, after three to warm up.

    Args:
        lead: a matrix that the device multiplies first, for some milliseconds in which the host queues what is timed:
            then only kernels are. Without it a short op takes as long as the host needs to launch it.
    """
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    if lead is not None:
        for _ in range(4):
            torch.matmul(lead, lead)
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) * 1e3 for start, end in pairwise(marks))


def lead_matrix(device: str | torch.device) -> Tensor:
    """A matrix that takes the device some milliseconds to multiply; see `microseconds`."""
    return random(LOAD_SIZE, LOAD_SIZE, device=device)


def random(*shape: int, device: str | torch.device) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.bfloat16)
