"""The panels of a comparison, declared once: compare.html draws them, the W&B dashboard asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["curve", "difference", "bars", "parts", "pareto", "scaling", "ledger"]
"""curve: metrics over tokens, a line a run. difference: the same less the baseline's, on a log axis. bars: a figure a
run. parts: what makes up a figure, stacked. pareto: the first metric against the second, a point a run. scaling: speed
a device over the world size, as a share of the smallest's. ledger: bytes by axis and collective, measured beside expected."""


@dataclass(frozen=True)
class Panel:
    name: str
    """Of its PNG, and its place in the page."""
    title: str
    kind: Kind
    metrics: tuple[str, ...]
    """Names of `track/names.py`, or keys of summary.json; a key that ends in `.*` stands for each part below it."""
    reads: str
    """What one reads from it, in a sentence."""
    log: bool = False
    whole: str | None = None
    """Of parts: the figure that they belong to, where it is measured apart from them and not their sum."""


CORRECTNESS = (
    Panel("loss", "Loss", "curve", ("train/loss",), "Plans of one experiment lie on each other."),
    Panel(
        "difference",
        "Loss less the baseline's",
        "difference",
        ("train/loss",),
        "Between plans this is the rounding of the dtype, not a trend.",
        log=True,
    ),
    Panel("held_out_loss", "Held-out loss", "curve", ("val/loss",), "On rows that are never trained on."),
    Panel(
        "grad_norm",
        "Gradient norm",
        "curve",
        ("train/grad_norm",),
        "Of the whole gradient, before clipping: the first to show a gradient that is scaled or counted twice.",
    ),
)
SPEED = (
    Panel(
        "tokens_per_second",
        "Tokens a second a device",
        "bars",
        ("perf/tokens_per_second_per_device",),
        "Median over the logged steps after warm-up.",
    ),
    Panel(
        "mfu",
        "MFU",
        "bars",
        ("perf/mfu",),
        "Model FLOPs (6N + 12Lhs a token) as a share of the device's peak.",
    ),
    Panel(
        "step_time",
        "Step time by phase",
        "parts",
        (
            "time/data_s",
            "time/forward_s",
            "time/loss_s",
            "time/backward_s",
            "time/clip_s",
            "time/optimizer_s",
        ),
        "Medians on rank 0, collectives that a phase waits for in it; on a GPU data overlaps with the step before.",
        whole="perf/step_time_s",
    ),
    Panel(
        "scaling",
        "Scaling efficiency",
        "scaling",
        ("perf/tokens_per_second_per_device",),
        "Speed a device as a share of that on the fewest ranks of its line; along a line one mesh axis grows.",
    ),
)
MEMORY_AND_COMMUNICATION = (
    Panel(
        "peak_memory",
        "Peak memory",
        "bars",
        ("memory/peak_bytes",),
        "Most that the device of rank 0 has held; on a CPU, its whole process.",
    ),
    Panel(
        "memory_by_kind",
        "Peak memory by kind",
        "parts",
        ("memory/at_peak_bytes.*",),
        "Of one step, where rank 0 held the most.",
    ),
    Panel(
        "bytes_by_axis",
        "Sent a step, by mesh axis",
        "parts",
        ("comm/bytes_per_step_by_axis.*",),
        "By rank 0, by the ring formulas.",
    ),
    Panel(
        "ledger",
        "Sent a step, by axis and collective",
        "ledger",
        ("comm/bytes_per_step_by_collective.*", "comm/expected_bytes_per_step_by_collective.*"),
        "Measured on one step, beside what closed formulas expect.",
    ),
    Panel(
        "memory_against_speed",
        "Memory against speed",
        "pareto",
        ("memory/peak_bytes", "perf/tokens_per_second_per_device"),
        "A run with another below and to the right of it is worse in both.",
    ),
)
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Correctness": CORRECTNESS,
    "Speed": SPEED,
    "Memory and communication": MEMORY_AND_COMMUNICATION,
}
