"""Traces of small jobs held to one process, as law 1 has it."""

from __future__ import annotations

import hashlib
from typing import Any

from tpresearch.verify.ranks import Ranks
from tpresearch.verify.trace import EXACT, RunTrace, compare

PLANS = ["ddp", "tp", "sp", "fsdp", "hsdp", "fsdp_tp", "hsdp_tp"]
"""All that take more than one rank."""

CLIP = 0.2
"""A gradient norm that every step of these jobs is above, so that clipping is in the proof."""


def digest(result: RunTrace) -> str:
    """Equal on two ranks where losses, norms and all weights are, to the bit."""
    found = hashlib.sha256()
    for step in result.steps:
        found.update(f"{step.loss!r} {step.grad_norm!r}".encode())
        for weight in step.weights.values():
            found.update(weight.numpy().tobytes())
    return found.hexdigest()


def digested(result: RunTrace, rank: int) -> tuple[str, RunTrace | None]:
    """What a rank of a job returns: a trace is large to send, and one is enough where all are the same."""
    return digest(result), result if rank == 0 else None


def traced(ranks: Ranks, size: int, job: Any, *args: Any) -> tuple[RunTrace, bool]:
    """Rank 0's trace of a job that returns `digested`, and whether all ranks have the same one."""
    digests, traces = zip(*ranks.run(size, job, *args), strict=True)
    return traces[0], len(set(digests)) == 1


def agree(ours: RunTrace, theirs: RunTrace, tolerance: float = 1e-10) -> None:
    """Initial weights and what ranks hold alike to the bit; all else within `tolerance`, relative."""
    for step in theirs.steps:
        assert step.grad_norm > CLIP, "clipping does not bite: the test would not see it"
        for tensors in (step.gradients, step.weights):
            assert all(tensor.isfinite().all() and tensor.abs().max() > 0 for tensor in tensors.values())
    found = compare(ours, theirs)
    out = {q: worst for q, worst in found.items() if not worst.error <= (0 if q in EXACT else tolerance)}
    assert not out, out
