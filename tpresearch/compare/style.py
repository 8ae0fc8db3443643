"""Appearance of charts: units, and one colour and shape per run everywhere, safe for colour-blind readers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import cycle
from typing import Any, NamedTuple

import altair as alt
import pandas as pd

from tpresearch.config.axes import AXIS_NAMES
from tpresearch.track.names import METRICS
from tpresearch.track.text import bytes_text, count_text, figures_text, share_text

WIDTH, HEIGHT = 600, 280
"""Of a chart with its axes and labels, in pixels."""
GREY = "#9a9a9a"
# Okabe and Ito's colours; the shapes tell runs apart in grey too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES: tuple[list[float], ...] = ([1, 0], [7, 3], [2, 3], [9, 3, 2, 3])
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
# Paul Tol's light scheme, for the parts of a figure: none of them is a run's.
PART_COLOURS = (
    *("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#44bb99"),
    *("#99ddff", "#bbcc33", "#aaaa00", "#dddddd"),
)
# A hue per mesh axis, in shades for the collectives over it.
AXIS_COLOURS = (
    ("#9a8bc2", "#c3b8de", "#6f5c9f", "#e0d9ef"),
    ("#4f8fc4", "#9cc3e4", "#2b6393", "#cfe2f2"),
    ("#e0a03c", "#f2cd8b", "#a96f14", "#f8e6c6"),
)
CHART_CONFIG: dict[str, Any] = {
    "font": "sans-serif",
    "background": "white",
    "view": {"stroke": None},
    "axis": {"gridColor": "#ececec", "titleFontWeight": "normal", "labelFontSize": 11, "titleFontSize": 12},
    "legend": {"labelFontSize": 11, "labelLimit": 0, "symbolSize": 80, "symbolStrokeWidth": 1},
    "title": {
        "anchor": "start",
        "fontSize": 15,
        "subtitleFontSize": 12,
        "subtitleColor": "#555555",
        "offset": 12,
    },
}


DASH = alt.StrokeDash("dash:N", scale=alt.Scale(domain=range(len(DASHES)), range=DASHES), legend=None)
"""Of the lines of a run; the legend has its shape."""


class ChartStyle:
    """The colours and shapes of one set of runs.

    Args:
        runs: their labels, in order.
        baselines: the labels of the baselines: drawn with broad lines, and grey if there is only one.
    """

    def __init__(self, runs: Sequence[str], baselines: Sequence[str]) -> None:
        self.runs, self.baselines = list(runs), list(baselines)
        grey = dict.fromkeys(baselines, GREY) if len(baselines) == 1 else {}
        others = [run for run in runs if run not in grey]
        self.colours = dict(zip(others, cycle(COLOURS), strict=False)) | grey
        # Where colours repeat they do so with another dash and another shape.
        self.dashes = {run: i // len(COLOURS) % len(DASHES) for i, run in enumerate(others)}
        shapes = {run: SHAPES[(i + i // len(COLOURS)) % len(SHAPES)] for i, run in enumerate(others)}
        self.shapes = shapes | dict.fromkeys(grey, "circle")

    @property
    def baseline(self) -> str:
        """The baseline's name in the title of an axis."""
        return self.baselines[0] if len(self.baselines) == 1 else "its baseline"

    def present(self, points: pd.DataFrame) -> list[str]:
        """The runs that have points, in order."""
        there = set(points["run"])
        return [run for run in self.runs if run in there]

    def colour(self, points: pd.DataFrame, legend: bool = True) -> alt.Color:
        names = self.present(points)
        scale = alt.Scale(domain=names, range=[self.colours[name] for name in names])
        return alt.Color("run:N", scale=scale, legend=legend_of(names) if legend else None)

    def shape(self, points: pd.DataFrame, lines: bool = False) -> alt.Shape:
        names = self.present(points)
        shapes = self.shapes | (dict.fromkeys(self.baselines, "stroke") if lines else {})
        scale = alt.Scale(domain=names, range=[shapes[name] for name in names])
        return alt.Shape("run:N", scale=scale, legend=legend_of(names))


def part_colour(names: Sequence[str], width: int) -> alt.Color:
    """The colours of a figure's parts, those of a mesh axis in its hue; the legend is `width` pixels wide."""
    shades = {axis: cycle(hue) for axis, hue in zip(AXIS_NAMES, AXIS_COLOURS, strict=False)}
    of_no_axis = cycle(PART_COLOURS)
    colours = [next(shades.get(name.split()[0], of_no_axis)) for name in names]
    scale = alt.Scale(domain=list(names), range=colours)
    return alt.Color("part:N", scale=scale, legend=legend_of(names, width))


def order_parts(names: Iterable[str]) -> list[str]:
    """Parts in the order they came, those of mesh axes by axis, the outermost first."""
    return sorted(
        dict.fromkeys(names), key=lambda name: [*AXIS_NAMES, name.split()[0]].index(name.split()[0])
    )


def legend_of(names: Sequence[str], width: int = WIDTH - 40) -> alt.Legend:
    """A legend below the chart, in as many columns as fit."""
    columns = width // (6 * max(map(len, names), default=1) + 28)
    return alt.Legend(title=None, orient="bottom", symbolOpacity=1, columns=max(1, min(8, columns)))


class DisplayUnit(NamedTuple):
    """The unit in which a metric is drawn: its name, its size (values are divided by it), and a value as text."""

    name: str
    size: float
    text: Callable[[float], str]

    def axis_title(self, what: str) -> str:
        return f"{what} ({self.name})" if self.name else what


def unit_of(metric: str, values: pd.Series) -> DisplayUnit:
    """Chosen by the metric's kind and its maximum: MiB or GiB, ms or s, %, tokens/s."""
    unit = {metric.name: metric.unit for metric in METRICS}.get(metric, "")
    greatest = values.abs().max()
    if "bytes" in metric:
        name = bytes_text(greatest).split()[1]
        return DisplayUnit(name, 1024 ** ("B", "KiB", "MiB", "GiB", "TiB").index(name), bytes_text)
    if metric.startswith("perf/mfu"):
        return DisplayUnit("%", 0.01, share_text)
    if unit == "tokens/s":
        return DisplayUnit(unit, 1, count_text)
    if unit == "s":
        size, name = (1e-3, "ms") if greatest < 1 else (1.0, "s")
        return DisplayUnit(name, size, lambda seconds: f"{figures_text(seconds / size)} {name}")
    return DisplayUnit(unit, 1, lambda value: f"{value:.6g}")
