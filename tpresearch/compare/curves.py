"""Charts with two axes of numbers: curves over tokens, memory against speed, scaling over ranks."""

from __future__ import annotations

from typing import Literal

import altair as alt

from tpresearch.compare.look import HEIGHT, WIDTH, Drawn, Look
from tpresearch.compare.numbers import Points
from tpresearch.compare.units import unit_of
from tpresearch.track.panels import Panel

MARKS = 9
"""On each curve: where curves lie on each other, they tell which ones do."""
PICK = alt.selection_point(name="pick", fields=["run"], bind="legend")
ZOOM = alt.selection_interval(name="zoom", bind="scales", zoom="wheel![event.shiftKey]")
PICKED = alt.condition(PICK, alt.value(1), alt.value(0.1))


def curves(panel: Panel, points: Points, look: Look) -> Drawn:
    """Lines over tokens. A click in the legend leaves one run in full colour; dragging moves, shift and wheel zoom."""
    unit = unit_of(panel.metrics[0], [point["value"] for point in points])
    base = _over_tokens(panel, points, look)
    title, scale = unit.titled(panel.title), alt.Scale(zero=False)
    y = _y("value:Q", title, scale)
    line, mark = _line(base, y), _mark(base, y, points, look)
    if not any("low" in point for point in points):
        return _layered([line, mark])
    band = base.transform_filter("isValid(datum.low)").mark_area(clip=True)
    faint = alt.condition(PICK, alt.value(0.2), alt.value(0.03))
    return _layered([band.encode(y=_y("low:Q", title, scale), y2="high:Q", opacity=faint), line, mark])


def differences(panel: Panel, points: Points, look: Look) -> Drawn:
    """Each difference as a dot, the greatest so far as a line: between two plans the dots are noise."""
    base = _over_tokens(panel, points, look)
    scale = alt.Scale(type="log", nice=False, padding=8)
    title = f"|loss − loss of {look.baseline}|"
    dots = base.mark_point(filled=True, size=14, clip=True).encode(
        y=_y("value:Q", title, scale), opacity=alt.condition(PICK, alt.value(0.45), alt.value(0.05))
    )
    y = _y("so_far:Q", title, scale)
    return _layered([dots, _line(base, y, interpolate="step-after"), _mark(base, y, points, look)])


def _over_tokens(panel: Panel, points: Points, look: Look) -> alt.Chart:
    x = alt.X(
        "tokens:Q",
        scale=alt.Scale(nice=False, padding=8),
        axis=alt.Axis(title="tokens", format="~s", grid=False),
    )
    value = alt.Tooltip("exact:N" if panel.kind == "difference" else "value:Q", title=panel.title)
    return alt.Chart(alt.Data(values=_marked(points, look))).encode(
        x=x,
        color=look.colour(points),
        tooltip=[alt.Tooltip("run:N"), alt.Tooltip("tokens:Q", format=","), value],
    )


def _y(field: str, title: str, scale: alt.Scale) -> alt.Y:
    axis = (
        alt.Axis(title=title, format=".0e", tickCount=5) if scale["type"] == "log" else alt.Axis(title=title)
    )
    return alt.Y(field, scale=scale, axis=axis)


def _line(base: alt.Chart, y: alt.Y, interpolate: Literal["linear", "step-after"] = "linear") -> alt.Chart:
    broad = alt.condition("datum.baseline", alt.value(6), alt.value(1.5))
    return base.mark_line(strokeCap="round", clip=True, interpolate=interpolate).encode(
        y=y, strokeWidth=broad, opacity=PICKED
    )


def _mark(base: alt.Chart, y: alt.Y, points: Points, look: Look) -> alt.Chart:
    drawn = base.transform_filter("datum.mark > 0").mark_point(
        filled=True, stroke="white", strokeWidth=0.7, clip=True
    )
    size = alt.Size("mark:Q", scale=None)
    return drawn.encode(y=y, size=size, shape=look.shape(points, lines=True), opacity=PICKED)


def _layered(layers: list[alt.Chart]) -> Drawn:
    return alt.layer(*layers[:-1], layers[-1].add_params(PICK, ZOOM)).properties(width=WIDTH, height=HEIGHT)


def _marked(points: Points, look: Look) -> Points:
    """The baseline first, and so below; `mark` is the size of a mark, where a point has one.

    Each of the others has them at points of its own. Where there are too few points for that, all have them, the later
    runs smaller ones upon those of the earlier.
    """
    lines: dict[str, Points] = {}
    for point in points:
        lines.setdefault(point["run"], []).append(point)
    others = [run for run in look.runs if run in lines and run != look.baseline]
    drawn = [point | {"baseline": True} for point in lines.get(look.baseline, [])]
    for index, run in enumerate(others):
        line = lines[run]
        stride = max(len(others), len(line) // MARKS)
        few = len(line) < 2 * stride
        size = min(600, 45 * 1.6 ** (len(others) - 1 - index)) if few else 52
        mine = index * stride // len(others)
        drawn += [point | {"mark": size if few or i % stride == mine else 0} for i, point in enumerate(line)]
    return drawn


def pareto(panel: Panel, points: Points, look: Look) -> Drawn:
    """Memory over speed, a point a run, and a line through those that no other beats in both."""
    memory = unit_of(panel.metrics[0], [point["memory"] for point in points])
    speed = unit_of(panel.metrics[1], [point["speed"] for point in points])
    drawn = [
        point
        | {"memory": point["memory"] / memory.size, "memory_text": memory.text(point["memory"])}
        | {"speed": point["speed"] / speed.size, "speed_text": speed.text(point["speed"])}
        for point in points
    ]
    base = alt.Chart(alt.Data(values=drawn)).encode(
        x=alt.X(
            "speed:Q",
            scale=_around([p["speed"] for p in drawn]),
            axis=alt.Axis(title="tokens/s/device", format="~s"),
        ),
        y=alt.Y(
            "memory:Q",
            scale=_around([p["memory"] for p in drawn]),
            axis=alt.Axis(title=memory.titled("peak memory")),
        ),
    )
    front = base.transform_filter("datum.front").mark_line(
        color="#aaaaaa", strokeDash=[4, 3], interpolate="step-before"
    )
    runs = base.mark_point(filled=True, size=120, opacity=1).encode(
        color=look.colour(points),
        shape=look.shape(points),
        tooltip=[
            alt.Tooltip("run:N"),
            alt.Tooltip("memory_text:N", title="peak memory"),
            alt.Tooltip("speed_text:N", title="tokens/s/device"),
        ],
    )
    return alt.layer(front.encode(order="speed:Q"), runs).properties(width=WIDTH, height=HEIGHT)


def _around(values: list[float]) -> alt.Scale:
    """The values with some room about them; by powers where they are orders of magnitude apart."""
    least, most = min(values), max(values)
    if least > 0 and most > 10 * least:
        return alt.Scale(type="log", domain=[least / 1.4, most * 1.4], nice=False)
    room = 0.12 * (most - least or most or 1)
    return alt.Scale(domain=[max(0, least - room), most + room], nice=False)


def scaling(panel: Panel, points: Points, look: Look) -> Drawn:
    """Speed a device over ranks, as a share of that on the fewest: a line a plan, a point a run."""
    ranks = sorted({point["ranks"] for point in points})
    ticks = alt.Axis(title="ranks", values=ranks, format="d", grid=False)
    base = alt.Chart(alt.Data(values=points)).encode(
        x=alt.X("ranks:Q", scale=alt.Scale(type="log", base=2, nice=False, padding=18), axis=ticks),
        y=alt.Y(
            "share:Q",
            scale=alt.Scale(domainMin=0, domainMax=max(1.1, *(1.1 * point["share"] for point in points))),
            axis=alt.Axis(title="tokens/s/device, of that on the fewest ranks", format=".0%"),
        ),
    )
    ideal = (
        alt.Chart(alt.Data(values=[{"share": 1}]))
        .mark_rule(color="#aaaaaa", strokeDash=[4, 3])
        .encode(y="share:Q")
    )
    line = base.mark_line(color="#aaaaaa").encode(detail="plan:N")
    runs = base.mark_point(filled=True, size=110, opacity=1).encode(
        color=look.colour(points),
        shape=look.shape(points),
        tooltip=[alt.Tooltip("run:N"), alt.Tooltip("ranks:Q"), alt.Tooltip("share:Q", format=".1%")],
    )
    return alt.layer(ideal, line, runs).properties(width=WIDTH, height=HEIGHT)
