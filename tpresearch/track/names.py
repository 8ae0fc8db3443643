"""The metrics of a run: their names, units and meanings, declared only here.

metrics.jsonl, W&B, the terminal, comparisons and dashboards use these names. To log another metric, add
a line.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import SupportsFloat

from tpresearch.config.axes import AXES, AXIS_NAMES
from tpresearch.ledger.entries import MEMORY_KINDS

Row = dict[str, int | float | None]
"""One logged step: a value for every metric, None if it is undefined."""


@dataclass(frozen=True)
class Metric:
    name: str
    unit: str
    meaning: str


METRICS = (
    Metric("train/step", "steps", "optimizer steps done since the run began"),
    Metric("train/tokens", "tokens", "target tokens trained on since the run began, over all ranks"),
    Metric("train/loss", "nats/token", "train.loss over the global batch, before the update"),
    Metric("train/grad_norm", "", "norm of the global gradient, before clipping"),
    Metric("train/lr", "", "learning rate of this update"),
    Metric(
        "train/skipped_updates",
        "updates",
        "updates since the last logged step that were skipped, since their gradient norm was not finite; null unless train.on_nonfinite=skip",
    ),
    Metric("val/loss", "nats/token", "cross-entropy over the held-out rows, at steps that evaluate"),
    Metric("perf/step_time_s", "s", "wall time per step, averaged since the last logged one"),
    Metric("perf/tokens_per_second", "tokens/s", "tokens per second over all ranks"),
    Metric("perf/tokens_per_second_per_device", "tokens/s", "tokens per second, divided by the world size"),
    Metric("perf/mfu", "", "model FLOPs over the peak, with full attention (6N + 12Lhs per token)"),
    Metric("perf/mfu_causal", "", "model FLOPs over the peak, with causal attention (6N + 6Lhs per token)"),
    Metric("time/data_s", "s", "host time to prepare a batch; on a GPU it overlaps with the previous step"),
    Metric("time/forward_s", "s", "time per step in the forward pass, with collectives that it waits for"),
    Metric("time/loss_s", "s", "time per step in the loss"),
    Metric("time/backward_s", "s", "time per step in the backward pass"),
    Metric("time/clip_s", "s", "time per step in the gradient norm and clipping"),
    Metric("time/optimizer_s", "s", "time per step in the update"),
    Metric("memory/peak_bytes", "bytes", "peak memory of rank 0's device"),
    Metric("memory/reserved_bytes", "bytes", "peak memory that CUDA's allocator reserves; null on a CPU"),
    Metric("memory/alloc_retries", "times", "how often it has emptied its cache to make room; null on a CPU"),
    Metric("comm/bytes_per_step", "bytes", "bytes rank 0 sends in a step, by the ring formulas"),
)

NAMES = tuple(metric.name for metric in METRICS)
X_AXIS = "train/tokens"
"""The x axis of curves: comparable between plans, meshes and batch sizes, and across a resume."""

_SENT = tuple(f"{axis.name}/{collective}" for axis in AXES for collective in axis.collectives)
SUMMARY_PARTS: dict[str, tuple[str, ...]] = {
    "memory/held_bytes": MEMORY_KINDS,
    "memory/at_peak_bytes": MEMORY_KINDS,
    "comm/bytes_per_step_by_axis": AXIS_NAMES,
    "comm/bytes_per_step_by_collective": _SENT,
    "comm/expected_bytes_per_step_by_collective": _SENT,
}
"""The figures of summary.json that are objects, and the parts that our plans give them, each where it is not 0."""


def complete_row(values: Mapping[str, SupportsFloat | None]) -> Row:
    """Every metric in its declared order; None if a value is missing, NaN or infinite. A KeyError for a name that is not declared."""
    if undeclared := values.keys() - set(NAMES):
        raise KeyError(f"{min(undeclared)} is logged but not declared; add it to METRICS in track/names.py")
    return {name: finite_or_none(values.get(name)) for name in NAMES}


def step_of(row: Row) -> int:
    return int(row["train/step"] or 0)


def finite_or_none(value: SupportsFloat | None) -> int | float | None:
    """A number that JSON can hold: None for NaN and infinity, which are not measurements."""
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
