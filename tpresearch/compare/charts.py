"""Each panel as one Altair chart: its Vega-Lite specification for the page, and its PNG."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import vl_convert

from tpresearch.compare.style import (
    CHART_CONFIG,
    DASH,
    HEIGHT,
    WIDTH,
    ChartStyle,
    order_parts,
    part_colour,
    unit_of,
)
from tpresearch.track.panels import Kind, Panel

Spec = dict[str, Any]
BAR_HEIGHT = 26
"""Pixels from one bar to the next."""
MAX_NAME_WIDTH = 230
"""Maximum width of a run's name next to its bar, in pixels."""
MARKS_PER_CURVE = 9
"""Per curve: where curves coincide, these show which ones do."""
PICK = alt.selection_point(name="pick", fields=["run"], bind="legend")
ZOOM = alt.selection_interval(name="zoom", bind="scales", zoom="wheel![event.shiftKey]")
PICKED = alt.condition(PICK, alt.value(1), alt.value(0.1))
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
DASHED: dict[str, Any] = {"color": "#aaaaaa", "strokeDash": [4, 3]}


def chart_spec(panel: Panel, points: pd.DataFrame, style: ChartStyle) -> Spec:
    """The Vega-Lite specification of a panel's chart, with the points of its `panel_data` in it."""
    drawn = DRAW_BY_KIND[panel.kind](panel, points, style)
    fit = alt.AutoSizeParams(type="fit-x", contains="padding")
    with alt.data_transformers.disable_max_rows():  # pyrefly: ignore[bad-context-manager]
        return drawn.properties(autosize=fit).configure(**CHART_CONFIG).to_dict()


def png(spec: Spec, panel: Panel, notes: Sequence[str]) -> bytes:
    """The chart with its title and how to read it, since a PNG is passed on without its page."""
    title = {"text": panel.title, "subtitle": [panel.description, *notes]}
    text = json.dumps({**spec, "title": title})
    return vl_convert.vegalite_to_png(text, vl_version=VEGA_LITE, scale=2, allowed_base_urls=[])


@cache
def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed, for a page that must not ask the network for them. Bundling takes two seconds."""
    return vl_convert.javascript_bundle(vl_version=VEGA_LITE)  # pyrefly: ignore[missing-argument]


def _layered(*layers: alt.Chart, height: int = HEIGHT) -> alt.LayerChart:
    return alt.LayerChart(layer=list(layers), width=WIDTH, height=height)


def _curves(panel: Panel, points: pd.DataFrame, style: ChartStyle) -> alt.LayerChart:
    """Lines over tokens. A click in the legend highlights one run; dragging pans, shift and wheel zoom."""
    base = _over_tokens(points, style, alt.Tooltip("value:Q", title=panel.title))
    title = unit_of(panel.metrics[0], points["value"]).axis_title(panel.title)
    curves = _line_and_marks(base, alt.Y("value:Q").title(title).scale(zero=False), points, style)
    if "low" not in points:
        return _layered(*curves)
    low = alt.Y("low:Q").title(title).scale(zero=False)
    faint = alt.condition(PICK, alt.value(0.2), alt.value(0.03))
    band = base.transform_filter("isValid(datum.low)").mark_area(clip=True)
    return _layered(band.encode(y=low, y2="high:Q", opacity=faint), *curves)


def _differences(panel: Panel, points: pd.DataFrame, style: ChartStyle) -> alt.LayerChart:
    """Each difference as a dot, the running maximum as a line: between two plans the dots are rounding noise."""

    def y(field: str) -> alt.Y:
        axis = alt.Axis(title=f"|loss − loss of {style.baseline}|", format=".0e", tickCount=5)
        return alt.Y(field, axis=axis).scale(type="log", nice=False, padding=8)

    base = _over_tokens(points, style, alt.Tooltip("exact:N", title=panel.title))
    dots = base.mark_point(filled=True, size=14, clip=True).encode(
        y=y("value:Q"), opacity=alt.condition(PICK, alt.value(0.45), alt.value(0.05))
    )
    return _layered(dots, *_line_and_marks(base, y("so_far:Q"), points, style, in_steps=True))


def _over_tokens(points: pd.DataFrame, style: ChartStyle, value: alt.Tooltip) -> alt.Chart:
    return alt.Chart(_with_marks(points, style)).encode(
        x=alt.X("tokens:Q").scale(nice=False, padding=8).axis(format="~s", grid=False),
        color=style.colour(points),
        tooltip=[alt.Tooltip("run:N"), alt.Tooltip("tokens:Q", format=","), value],
    )


def _line_and_marks(
    base: alt.Chart, y: alt.Y, points: pd.DataFrame, style: ChartStyle, in_steps: bool = False
) -> tuple[alt.Chart, alt.Chart]:
    broad = alt.condition("datum.baseline", alt.value(6), alt.value(1.5))
    line = base.mark_line(strokeCap="round", clip=True, interpolate="step-after" if in_steps else "linear")
    marked = base.transform_filter("datum.mark > 0")
    mark = marked.mark_point(filled=True, stroke="white", strokeWidth=0.7, clip=True)
    size, shape = alt.Size("mark:Q", scale=None), style.shape(points, lines=True)
    return (
        line.encode(y=y, strokeWidth=broad, strokeDash=DASH, opacity=PICKED),
        mark.encode(y=y, size=size, shape=shape, opacity=PICKED).add_params(PICK, ZOOM),
    )


def _with_marks(points: pd.DataFrame, style: ChartStyle) -> pd.DataFrame:
    """The baseline first, and so below the others; `mark` is the size of a point's mark, 0 for none; `dash` that of its line.

    Curves have their marks at different points, if there are enough. The single point of a run always has one,
    later runs a smaller one on top of those of the earlier.
    """
    others = [run for run in style.present(points) if run not in style.baselines]
    place = points["run"].map({run: index for index, run in enumerate(others)})
    by_run = points.groupby("run")["run"]
    nth, rows = by_run.cumcount(), by_run.transform("size")
    stride = (rows // MARKS_PER_CURVE).clip(lower=max(1, min(len(others), MARKS_PER_CURVE))).clip(upper=rows)
    nested = (45 * 1.6 ** (len(others) - 1 - place)).clip(upper=600)
    mark = np.where(rows == 1, nested, np.where(nth % stride == place * stride // max(len(others), 1), 52, 0))
    baseline = points["run"].isin(style.baselines)
    dash = points["run"].map(style.dashes).fillna(0)
    marked = points.assign(baseline=baseline, mark=np.where(baseline, 0, mark), dash=dash)
    return marked.sort_values("baseline", ascending=False, kind="stable")


def _bars(panel: Panel, points: pd.DataFrame, style: ChartStyle) -> alt.LayerChart:
    """One bar per run with its figure at the end, or two for measured and expected; of a prediction one that says so.

    A bar may be split into parts; over seeds it has a line of one standard deviation to each side.
    """
    keys = [key for key in ("run", "side") if key in points]
    first = {key: "first" for key in ("whole", "high") if key in points}
    ends = points.groupby(keys, sort=False, as_index=False).agg({"value": "sum", **first})
    unit = unit_of(panel.metrics[0], ends["value"])
    ends["text"] = ends.get("whole", ends["value"]).map(unit.text)
    ends["text"] += " per step" if "whole" in ends else " " + ends["side"] if "side" in ends else ""
    ends["value"] = ends.reindex(columns=["value", "high"]).max(axis="columns") / unit.size
    lengths = {key: points[key] / unit.size for key in ("value", "low", "high") if key in points}
    points = points.assign(text=points["value"].map(unit.text), **lengths)

    names = alt.Axis(title=None, labelLimit=MAX_NAME_WIDTH, ticks=False, domain=False, labelPadding=6)
    scale = alt.Scale(domain=[0, (1.4 if "side" in ends else 1.2) * (ends["value"].max() or 1)], nice=False)
    axis = alt.Axis(title=unit.name, format=",~r", tickCount=5, labelOverlap=True)
    where: dict[str, Any] = {
        "x": alt.X("value:Q", scale=scale, axis=axis),
        "y": alt.Y("run:N", sort=style.present(points), axis=names).scale(
            paddingInner=0.36, paddingOuter=0.18
        ),
    }
    how: dict[str, Any] = {"color": style.colour(points, legend=False)}
    if "part" in points:
        parts = order_parts(points["part"])
        points["order"] = points["part"].map(parts.index)
        beside_names = WIDTH - min(MAX_NAME_WIDTH, 7 * points["run"].str.len().max()) - 20
        how = {"color": part_colour(parts, beside_names), "order": alt.Order("order:Q")}
    if "side" in points:
        order = ["measured", "predicted", "expected"]
        where["yOffset"] = alt.YOffset("side:N").sort(order).scale(paddingInner=0.1)
        how["opacity"] = alt.condition("datum.side == 'expected'", alt.value(0.5), alt.value(1))
    how["tooltip"] = [f"{key}:N" for key in ("run", "side", "part", "text") if key in points]
    layers = [alt.Chart(points).mark_bar().encode(**where, **how)]
    if "low" in points:
        spread = alt.Chart(points).transform_filter("isValid(datum.low)")
        low = alt.X("low:Q", scale=scale, axis=axis)
        layers.append(spread.mark_rule(strokeWidth=1.5).encode(x=low, x2="high:Q", y=where["y"]))
    text = alt.Chart(ends).mark_text(align="left", dx=5, fontSize=11, color="#333333")
    return _layered(*layers, text.encode(**where, text="text:N"), height=BAR_HEIGHT * len(ends))


def _pareto(panel: Panel, points: pd.DataFrame, style: ChartStyle) -> alt.LayerChart:
    """Memory over speed, one point per run, and a line through those that no other beats in both."""
    memory, speed = (unit_of(panel.metrics[i], points[key]) for i, key in enumerate(("memory", "speed")))
    points = points.assign(
        memory=points["memory"] / memory.size,
        memory_text=points["memory"].map(memory.text),
        speed_text=points["speed"].map(speed.text),
    )
    around = alt.Scale(zero=False, nice=False, padding=30)
    x = alt.X("speed:Q", scale=around).axis(title="tokens/s/device", format="~s")
    y = alt.Y("memory:Q", scale=around).axis(title=memory.axis_title("peak memory"), format=",~r")
    base = alt.Chart(points).encode(x=x, y=y)
    front = base.transform_filter("datum.front").mark_line(interpolate="step-before", **DASHED)
    texts = {"memory_text": "peak memory", "speed_text": "tokens/s/device"}
    tooltips = [alt.Tooltip(f"{field}:N", title=title) for field, title in texts.items()]
    return _layered(front.encode(order="speed:Q"), _dots(base, points, style, tooltips))


def _scaling(panel: Panel, points: pd.DataFrame, style: ChartStyle) -> alt.LayerChart:
    """Speed per device over ranks, as a share of that on the fewest: one line per plan, one point per run."""
    ranks = sorted(set(points["ranks"]))
    share = alt.Axis(title="tokens/s/device, relative to the fewest ranks", format=".0%")
    base = alt.Chart(points).encode(
        x=alt.X("ranks:Q")
        .scale(type="log", base=2, nice=False, padding=18)
        .axis(values=ranks, format="d", grid=False),
        y=alt.Y("share:Q", axis=share).scale(domain=[0, 1.1 * max(1, points["share"].max())], nice=False),
    )
    ideal = alt.Chart(pd.DataFrame({"share": [1]})).mark_rule(**DASHED).encode(y="share:Q")
    line = base.mark_line(color="#aaaaaa").encode(detail="line:N")
    tooltips = [alt.Tooltip("ranks:Q"), alt.Tooltip("share:Q", format=".1%")]
    return _layered(ideal, line, _dots(base, points, style, tooltips))


def _dots(base: alt.Chart, points: pd.DataFrame, style: ChartStyle, tooltips: list[alt.Tooltip]) -> alt.Chart:
    return base.mark_point(filled=True, size=120, opacity=1).encode(
        color=style.colour(points), shape=style.shape(points), tooltip=[alt.Tooltip("run:N"), *tooltips]
    )


DRAW_BY_KIND: dict[Kind, Callable[[Panel, pd.DataFrame, ChartStyle], alt.LayerChart]] = {
    "curve": _curves,
    "difference": _differences,
    "bars": _bars,
    "parts": _bars,
    "ledger": _bars,
    "pareto": _pareto,
    "scaling": _scaling,
}
