"""How charts look: a run in the same colour and shape everywhere, told apart by every kind of colour vision."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import altair as alt

from tpresearch.compare.numbers import Points

Drawn = alt.LayerChart | alt.FacetChart
WIDTH = 600
"""Of a chart with its axes and labels, in pixels."""
HEIGHT = 280
BASELINE_COLOUR = "#9a9a9a"
# Okabe and Ito's colours; the shapes tell runs apart in grey too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right")
# Paul Tol's light scheme, for the parts of a figure: none of them is a run's.
PARTS = ("#77aadd", "#ee8866", "#eedd88", "#ffaabb", "#44bb99", "#99ddff", "#bbcc33", "#aaaa00", "#dddddd")
# A hue for each mesh axis, in shades for what is sent over it.
AXES = {
    "dp_replicate": ("#9a8bc2", "#c3b8de", "#6f5c9f", "#e0d9ef"),
    "dp_shard": ("#4f8fc4", "#9cc3e4", "#2b6393", "#cfe2f2"),
    "tp": ("#e0a03c", "#f2cd8b", "#a96f14", "#f8e6c6"),
}
_AXIS_TEXT = {"labelFontSize": 11, "titleFontSize": 12, "labelColor": "#333333", "titleColor": "#333333"}
CONFIG: dict[str, Any] = {
    "font": "sans-serif",
    "background": "white",
    "view": {"stroke": None},
    "axis": {
        "gridColor": "#ececec",
        "domainColor": "#888888",
        "tickColor": "#888888",
        "titleFontWeight": "normal",
    }
    | _AXIS_TEXT,
    "legend": {
        "labelFontSize": 11,
        "labelLimit": 0,
        "labelColor": "#333333",
        "symbolSize": 80,
        "symbolStrokeWidth": 1,
    },
    "title": {
        "anchor": "start",
        "fontSize": 15,
        "subtitleFontSize": 12,
        "subtitleColor": "#555555",
        "offset": 12,
    },
}


class Look:
    """The colours and shapes of one set of runs.

    Args:
        runs: their labels, in order.
        baseline: the label of the one that differences are taken from: grey, and broad where there are lines.
    """

    def __init__(self, runs: Sequence[str], baseline: str) -> None:
        self.runs, self.baseline = list(runs), baseline
        others = [run for run in runs if run != baseline]
        # Where colours come again they come with another shape.
        self.colours = {run: COLOURS[i % len(COLOURS)] for i, run in enumerate(others)} | {
            baseline: BASELINE_COLOUR
        }
        self.shapes = {run: SHAPES[(i + i // len(COLOURS)) % len(SHAPES)] for i, run in enumerate(others)} | {
            baseline: "circle"
        }

    def colour(self, points: Points, legend: bool = True) -> alt.Color:
        names = self._in(points)
        scale = alt.Scale(domain=names, range=[self.colours[name] for name in names])
        return alt.Color("run:N", scale=scale, legend=legend_of(names) if legend else None)

    def shape(self, points: Points, lines: bool = False) -> alt.Shape:
        names = self._in(points)
        shapes = self.shapes | ({self.baseline: "stroke"} if lines else {})
        scale = alt.Scale(domain=names, range=[shapes[name] for name in names])
        return alt.Shape("run:N", scale=scale, legend=legend_of(names))

    def _in(self, points: Points) -> list[str]:
        there = {point["run"] for point in points}
        return [run for run in self.runs if run in there]


def part_colour(names: Sequence[str], width: int) -> alt.Color:
    """The scale of a figure's parts, those named after a mesh axis in its hue; its legend is `width` pixels wide."""
    colours = []
    for index, name in enumerate(names):
        shades = AXES.get(name.split()[0])
        of_axis = [other for other in names if other.split()[0] == name.split()[0]]
        colours.append(shades[of_axis.index(name) % len(shades)] if shades else PARTS[index % len(PARTS)])
    return alt.Color(
        "part:N", scale=alt.Scale(domain=list(names), range=colours), legend=legend_of(names, width)
    )


def in_order(names: Iterable[str]) -> list[str]:
    """Parts as they came, those of mesh axes by axis: the outermost first."""
    known = list(AXES)
    named = list(dict.fromkeys(names))
    return sorted(named, key=lambda name: known.index(name.split()[0]) if name.split()[0] in known else -1)


def legend_of(names: Sequence[str], width: int = WIDTH - 60) -> alt.Legend:
    """Below the chart, in as many columns as fit."""
    longest = max(map(len, names), default=1)
    return alt.Legend(
        title=None, orient="bottom", symbolOpacity=1, columns=max(1, min(8, width // (6 * longest + 34)))
    )
