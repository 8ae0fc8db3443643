"""The unit in which the values of a metric are drawn, and how one of them reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tpresearch.track.names import METRICS
from tpresearch.track.shown import bytes_text, count_text, share_text

UNITS = {metric.name: metric.unit for metric in METRICS}


@dataclass(frozen=True)
class Unit:
    name: str
    """What an axis is titled with; empty for what has no unit."""
    size: float
    """By how much a value is divided for the axis."""
    text: Callable[[float], str]
    """A value before that, as it reads."""

    def titled(self, what: str) -> str:
        return f"{what} ({self.name})" if self.name else what


def unit_of(metric: str, values: Sequence[float]) -> Unit:
    """By what the metric counts and its greatest value: MiB for megabytes, ms for what is less than a second."""
    most = max(map(abs, values), default=0)
    if "bytes" in metric:
        names = ("B", "KiB", "MiB", "GiB", "TiB")
        power = next((i for i in range(len(names)) if most < 1000 * 1024**i), len(names) - 1)
        return Unit(names[power], 1024**power, bytes_text)
    if metric.startswith("perf/mfu"):
        return Unit("%", 0.01, share_text)
    if UNITS.get(metric) == "s":
        return (
            Unit("ms", 1e-3, _milliseconds) if most < 1 else Unit("s", 1, lambda seconds: f"{seconds:.3g} s")
        )
    if "tokens/s" in UNITS.get(metric, ""):
        return Unit("tokens/s", 1, count_text)
    return Unit(UNITS.get(metric, ""), 1, lambda value: f"{value:.6g}")


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"
