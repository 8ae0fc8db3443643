"""The panels of a comparison, declared once for compare.html and the W&B dashboard."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tpresearch.track.names import NAMES

Kind = Literal["curve", "difference", "bars", "parts", "pareto", "scaling", "ledger"]
"""curve: metrics over tokens, one line per run. difference: their absolute difference from the baseline, on a log axis.
bars: one figure per run. parts: the parts of a figure, stacked. pareto: the first metric against the second, one point
per run. scaling: speed per device over the world size, relative to the smallest. ledger: bytes by axis and collective,
measured beside expected."""


@dataclass(frozen=True)
class Panel:
    name: str
    """Name of its PNG, and its id in the page."""
    title: str
    kind: Kind
    metrics: tuple[str, ...]
    """Names of `track/names.py`, or keys of summary.json; a key that ends in `.*` stands for all keys below it."""
    description: str
    """How to read the panel, in one sentence."""
    log_scale: bool = False
    total: str | None = None
    """For parts: the figure they belong to, where it is measured separately and not their sum."""


CORRECTNESS = (
    Panel("loss", "Loss", "curve", ("train/loss",), "The curves of one experiment's plans coincide."),
    Panel(
        "difference",
        "Loss difference from the baseline",
        "difference",
        ("train/loss",),
        "Between plans this is rounding error of the dtype, which training may amplify; verify tells it from a mistake.",
        log_scale=True,
    ),
    Panel("held_out_loss", "Held-out loss", "curve", ("val/loss",), "On rows that are never trained on."),
    Panel(
        "grad_norm",
        "Gradient norm",
        "curve",
        ("train/grad_norm",),
        "Norm of the global gradient, before clipping: the first to reveal a gradient that is scaled or counted twice.",
    ),
)
SPEED = (
    Panel(
        "tokens_per_second",
        "Tokens per second per device",
        "bars",
        ("perf/tokens_per_second_per_device",),
        "Median over the logged steps after warm-up.",
    ),
    Panel("mfu", "MFU", "bars", ("perf/mfu",), "Model FLOPs (6N + 12Lhs per token) over the device's peak."),
    Panel(
        "step_time",
        "Step time by phase",
        "parts",
        tuple(name for name in NAMES if name.startswith("time/")),
        "Medians on rank 0, including collectives that a phase waits for; on a GPU, data overlaps with the previous step.",
        total="perf/step_time_s",
    ),
    Panel(
        "scaling",
        "Scaling efficiency",
        "scaling",
        ("perf/tokens_per_second_per_device",),
        "Speed per device relative to the fewest ranks of its line; along a line one mesh axis grows.",
    ),
)
MEMORY_AND_COMMUNICATION = (
    Panel(
        "peak_memory",
        "Peak memory",
        "bars",
        ("memory/peak_bytes",),
        "Peak memory of rank 0's device; on a CPU, of the tensors of one step, in W&B of the process.",
    ),
    Panel(
        "memory_by_kind",
        "Peak memory by kind",
        "parts",
        ("memory/at_peak_bytes.*",),
        "One step on rank 0, at its memory peak.",
    ),
    Panel(
        "bytes_by_axis",
        "Communication per step by mesh axis",
        "parts",
        ("comm/bytes_per_step_by_axis.*",),
        "Bytes sent by rank 0, by the ring formulas.",
    ),
    Panel(
        "ledger",
        "Communication per step by axis and collective",
        "ledger",
        ("comm/bytes_per_step_by_collective.*", "comm/expected_bytes_per_step_by_collective.*"),
        "Bytes sent by rank 0, measured on one step and expected by closed formulas.",
    ),
    Panel(
        "memory_against_speed",
        "Memory against speed",
        "pareto",
        ("memory/peak_bytes", "perf/tokens_per_second_per_device"),
        "A run with another one below and to its right is worse in both.",
    ),
)
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Correctness": CORRECTNESS,
    "Speed": SPEED,
    "Memory and communication": MEMORY_AND_COMMUNICATION,
}
