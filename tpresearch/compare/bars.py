"""Charts with a bar a run: one figure, what makes it up, and what a step sent beside what is expected."""

from __future__ import annotations

from typing import Any

import altair as alt

from tpresearch.compare.look import WIDTH, Drawn, Look, in_order, part_colour
from tpresearch.compare.numbers import Points
from tpresearch.compare.units import Unit, unit_of
from tpresearch.track.panels import Panel

STEP = 26
"""From a bar to the next, in pixels."""
NAME = 230
"""Of a run's name beside its bar, at most."""
SIDES = ("measured", "expected")


def bars(panel: Panel, points: Points, look: Look) -> Drawn:
    """A bar a run, its figure at the end; over seeds a line a standard deviation to each side."""
    unit = unit_of(panel.metrics[0], [point["value"] for point in points])
    drawn = [_scaled(point, unit) for point in points]
    base = _by_run(drawn, look).encode(
        x=_length(unit, drawn, room=1.2), color=look.colour(points, legend=False)
    )
    layers: list[alt.Chart] = [base.mark_bar(height=STEP * 0.64).encode(tooltip=["run:N", "text:N"])]
    if any("low" in point for point in points):
        spread = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=1.5)
        layers.append(spread.encode(x="low:Q", x2="high:Q", color=alt.value("#222222")))
    return _stacked_up(
        [*layers, _at_the_end(drawn, unit, look)], STEP * len({point["run"] for point in points})
    )


def parts(panel: Panel, points: Points, look: Look) -> Drawn:
    """A bar a run of its parts; at the end the whole where it was measured, else their sum."""
    names = in_order(point["part"] for point in points)
    sums = _sums(points)
    unit = unit_of(panel.metrics[0], list(sums.values()))
    ends = [_scaled({"run": run, "value": value}, unit) for (run, _), value in sums.items() if value]
    wholes = {point["run"]: point["whole"] for point in points if "whole" in point}
    for end in ends:
        if end["run"] in wholes:
            end["text"] = f"{unit.text(wholes[end['run']])} a step"
    base = _by_run([_part(point, unit, names) for point in points], look).encode(
        x=_length(unit, ends, room=1.2),
        color=part_colour(names, _beside_names(points)),
        order=alt.Order("order:Q"),
        tooltip=[alt.Tooltip("run:N"), alt.Tooltip("part:N"), alt.Tooltip("text:N", title=panel.title)],
    )
    return _stacked_up(
        [base.mark_bar(height=STEP * 0.64), _at_the_end(ends, unit, look)],
        STEP * len({point["run"] for point in points}),
    )


def ledger(panel: Panel, points: Points, look: Look) -> Drawn:
    """Two bars a run: what was measured, and paler below it what is expected."""
    names = in_order(sorted(point["part"] for point in points))
    sums = _sums(points)
    unit = unit_of(panel.metrics[0], list(sums.values()))
    ends = [_scaled({"run": run, "side": side, "value": value}, unit) for (run, side), value in sums.items()]
    for end in ends:
        end["text"] += f" {end['side']}"
    offset = alt.YOffset("side:N", sort=list(SIDES), scale=alt.Scale(paddingInner=0.1))
    base = _by_run([_part(point, unit, names) for point in points], look).encode(
        x=_length(unit, ends, room=1.4),
        yOffset=offset,
        color=part_colour(names, _beside_names(points)),
        opacity=alt.condition("datum.side == 'measured'", alt.value(1), alt.value(0.5)),
        order=alt.Order("order:Q"),
        tooltip=[
            alt.Tooltip("run:N"),
            alt.Tooltip("side:N"),
            alt.Tooltip("part:N"),
            alt.Tooltip("text:N", title="sent a step"),
        ],
    )
    text = _at_the_end(ends, unit, look, room=1.4).encode(yOffset=offset)
    return _stacked_up([base.mark_bar(), text], 1.7 * STEP * len({point["run"] for point in points}))


def _sums(points: Points) -> dict[tuple[str, str], float]:
    """By run, and by side where there are two."""
    sums: dict[tuple[str, str], float] = {}
    for point in points:
        where = (point["run"], point.get("side", ""))
        sums[where] = sums.get(where, 0) + point["value"]
    return sums


def _scaled(point: dict[str, Any], unit: Unit) -> dict[str, Any]:
    lengths = {key: point[key] / unit.size for key in ("value", "low", "high") if key in point}
    return point | lengths | {"text": unit.text(point["value"])}


def _part(point: dict[str, Any], unit: Unit, names: list[str]) -> dict[str, Any]:
    return _scaled(point, unit) | {"order": names.index(point["part"])}


def _by_run(points: Points, look: Look) -> alt.Chart:
    there = {point["run"] for point in points}
    names = [run for run in look.runs if run in there]
    axis = alt.Axis(title=None, labelLimit=NAME, ticks=False, domain=False, labelPadding=6)
    return alt.Chart(alt.Data(values=points)).encode(y=alt.Y("run:N", sort=names, axis=axis))


def _beside_names(points: Points) -> int:
    """Pixels that the names of runs leave to the bars."""
    return WIDTH - min(NAME, 7 * max(len(point["run"]) for point in points)) - 20


def _length(unit: Unit, ends: Points, room: float) -> alt.X:
    """The axis of the bars, with room for the text at their ends."""
    most = max((max(end["value"], end.get("high", 0)) for end in ends), default=1)
    axis = alt.Axis(title=unit.name, format=",~r", tickCount=5, labelOverlap=True)
    return alt.X("value:Q", scale=alt.Scale(domain=[0, room * most], nice=False), axis=axis)


def _at_the_end(ends: Points, unit: Unit, look: Look, room: float = 1.2) -> alt.Chart:
    shifted = [{**end, "value": max(end["value"], end.get("high", 0))} for end in ends]
    text = _by_run(shifted, look).mark_text(align="left", dx=5, fontSize=11, color="#333333")
    return text.encode(x=_length(unit, ends, room), text="text:N")


def _stacked_up(layers: list[alt.Chart], height: float) -> Drawn:
    return alt.layer(*layers).properties(width=WIDTH, height=height)
