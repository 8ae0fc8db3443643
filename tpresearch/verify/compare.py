"""Two traces beside each other: the greatest error of each quantity, and where it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tpresearch.config.schema import Dtype
from tpresearch.verify.trace import Tensors, Trace

TOLERANCES = {Dtype.float64: 1e-10, Dtype.float32: 1e-4, Dtype.bfloat16: 1e-1}
"""Greatest relative error that is rounding. A plan adds numbers up in another order, and AdamW divides by small ones."""

EXACT = ("initial weights", "between ranks")
"""Quantities that must be the same to the bit."""


@dataclass(frozen=True)
class MaxError:
    """The greatest relative error of one quantity, over all steps and parameters."""

    error: float
    step: int | None = None
    """Counted from 0; None for what is before the first."""
    parameter: str | None = None


def compare(ours: Trace, reference: Trace) -> dict[str, MaxError]:
    """The worst of each quantity. A tensor's error is relative to its greatest value in the reference.

    Initial weights do not depend on the order of any sum: they must be the same to the bit. So must what all
    ranks hold alike.
    """
    steps = list(enumerate(zip(ours.steps, reference.steps, strict=True)))
    return {
        "initial weights": _worst(_tensors(None, ours.initial, reference.initial)),
        "loss": _worst(MaxError(_relative(a.loss, b.loss), k) for k, (a, b) in steps),
        "grad norm": _worst(MaxError(_relative(a.grad_norm, b.grad_norm), k) for k, (a, b) in steps),
        "gradients": _worst(w for k, (a, b) in steps for w in _tensors(k, a.gradients, b.gradients)),
        "weights": _worst(w for k, (a, b) in steps for w in _tensors(k, a.weights, b.weights)),
        "between ranks": _worst(_apart(ours)),
        "held-out loss": MaxError(_relative(ours.held_out or 0.0, reference.held_out or 0.0)),
    }


def tolerance(quantity: str, dtype: Dtype) -> float:
    return 0.0 if quantity in EXACT else TOLERANCES[dtype]


def _worst(errors: Iterable[MaxError]) -> MaxError:
    """The greatest; NaN counts as greater than all."""
    return max(errors, key=lambda worst: (worst.error != worst.error, worst.error))


def _apart(trace: Trace) -> list[MaxError]:
    found = [MaxError(error, None, name) for name, error in trace.initial_between_ranks.items()]
    found += [
        MaxError(error, k, name)
        for k, step in enumerate(trace.steps)
        for name, error in step.between_ranks.items()
    ]
    return found or [MaxError(0.0)]


def _relative(ours: float, reference: float) -> float:
    return abs(ours - reference) / abs(reference) if reference else abs(ours)


def _tensors(step: int | None, ours: Tensors, reference: Tensors) -> list[MaxError]:
    if ours.keys() != reference.keys():
        missing = next(iter(ours.keys() ^ reference.keys()))
        return [MaxError(float("inf"), step, missing)]
    found = []
    for name, tensor in reference.items():
        scale = tensor.abs().max().item() or 1.0
        found.append(MaxError((ours[name] - tensor).abs().max().item() / scale, step, name))
    return found
