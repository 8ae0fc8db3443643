"""The numbers behind each panel, before anything is drawn: a list of points, and sentences about them.

Every point is a dict with plain keys of our own (`run`, `tokens`, `value`, ...), so that no name of a user's is ever
read as the name of a field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import mean, stdev
from typing import Any

from tpresearch.compare.groups import Group
from tpresearch.compare.labels import SEED, shown
from tpresearch.compare.runs import Run
from tpresearch.compare.scaling import lines_over_ranks
from tpresearch.track.names import X_AXIS
from tpresearch.track.panels import Panel

Points = list[dict[str, Any]]
MOST_POINTS = 1000
"""Of a curve that are drawn: a screen has no more columns."""
MOST_DOTS = 250
"""Of differences, where each point is a dot."""


@dataclass(frozen=True)
class Numbers:
    points: Points
    """Empty where there is nothing to draw; then `notes` says why."""
    notes: list[str] = field(default_factory=list)


def numbers(panel: Panel, groups: Sequence[Group], baseline: Group) -> Numbers:
    """What the panel shows of these runs."""
    by_kind: dict[str, Callable[[], Numbers]] = {
        "curve": lambda: curves(groups, panel.metrics[0]),
        "difference": lambda: differences(groups, baseline, panel.metrics[0]),
        "bars": lambda: bars(groups, panel.metrics[0]),
        "parts": lambda: parts(groups, panel.metrics, panel.whole),
        "pareto": lambda: pareto(groups, *panel.metrics),
        "scaling": lambda: scaling(groups, panel.metrics[0]),
        "ledger": lambda: ledger(groups),
    }
    return by_kind[panel.kind]()


def curves(groups: Sequence[Group], metric: str) -> Numbers:
    """`run`, `tokens`, `value`; over seeds the mean, with `low` and `high` a standard deviation from it."""
    lines = [(group.label, _over_seeds([_curve(run, metric) for run in group.runs])) for group in groups]
    drawn = _drawn(lines, f"No run has {metric}.")
    notes = list(drawn.notes)
    if any("low" in point for point in drawn.points):
        notes.append("The band is a standard deviation over seeds.")
    early = [group.label for group in groups if not any(run.rows for run in group.runs)]
    return Numbers(
        drawn.points, notes + ([f"Ended before its first row: {', '.join(early)}."] if early else [])
    )


def differences(groups: Sequence[Group], baseline: Group, metric: str) -> Numbers:
    """`run`, `tokens`, `value` = |metric - the baseline's| at the same tokens, `so_far` the greatest of them until there.

    What is 0 has the value of a floor below all others; `exact` is the difference as text.
    """
    if len(groups) == 1:
        return Numbers([], ["There is one run, and nothing to take it from."])
    if not any(run.rows for run in baseline.runs):
        return Numbers([], [f"{baseline.label} has no rows to take a loss from."])
    lines, notes = [], unpaired(groups, baseline)
    for group in groups:
        if group is baseline:
            continue
        pairs = [(run, partner) for run in group.runs if (partner := _partner(run, baseline))]
        gaps = [_gaps(run, partner, metric) for run, partner in pairs]
        lines.append((group.label, [{"tokens": at, "value": value} for at, value in _mean_of(gaps)]))
        if pairs and not lines[-1][1]:
            notes.append(f"{group.label} has no row at the tokens of {baseline.label}'s.")
    unequal = [point["value"] for _, line in lines for point in line if point["value"] > 0]
    if not unequal:
        if any(line for _, line in lines):
            return Numbers([], ["Every loss equals the baseline's in all digits.", *notes])
        return Numbers([], ["No run has rows at the baseline's tokens.", *notes])
    drawn = _greatest(lines)
    floor = min(unequal) / 3
    so_far: dict[str, float] = {}
    for point in drawn.points:
        most = so_far[point["run"]] = max(so_far.get(point["run"], floor), point["value"])
        exact = f"{point['value']:.2e}" if point["value"] else "0"
        point |= {"value": max(point["value"], floor), "so_far": most, "exact": exact}
    if any(point["exact"] == "0" for point in drawn.points):
        notes.append("Dots at the bottom are no difference at all, since a log axis has no 0.")
    return Numbers(drawn.points, ["A dot a step; the line is the greatest so far.", *notes, *drawn.notes])


def at_most(run: Run, baseline: Group, metric: str = "train/loss") -> float | None:
    """The greatest difference of a run from the baseline, over all its rows; None for the baseline itself, and without a partner."""
    partner = _partner(run, baseline)
    if run in baseline.runs or partner is None:
        return None
    return max(_gaps(run, partner, metric).values(), default=None)


def unpaired(groups: Sequence[Group], baseline: Group) -> list[str]:
    """A sentence for each group with runs that differences leave out: over seeds, those the baseline has no seed of."""
    sentences = []
    for group in groups:
        seeds = [shown(run.settings.get(SEED)) for run in group.runs if _partner(run, baseline) is None]
        if seeds:
            without = f"leaves out {SEED}={', '.join(dict.fromkeys(seeds))}"
            sentences.append(f"The difference of {group.label} {without}, of which the baseline has no run.")
    return sentences


def bars(groups: Sequence[Group], key: str) -> Numbers:
    """`run`, `value`; over seeds `low` and `high` a standard deviation from it."""
    values = [(group.label, _defined(group, key)) for group in groups]
    points = [{"run": label, **_spread(each)} for label, each in values if each]
    return Numbers(points, [] if points else [_undefined(key)])


def parts(groups: Sequence[Group], keys: Sequence[str], whole: str | None = None) -> Numbers:
    """`run`, `part`, `value` in the order of the keys, and `whole` where that has one; `.*` is each key below it."""
    points = []
    for group in groups:
        found: dict[str, list[float]] = {}
        for key in keys:
            for run in group.runs:
                for part, value in _parts(run, key):
                    found.setdefault(part, []).append(value)
        end = {"whole": mean(values)} if whole and (values := _defined(group, whole)) else {}
        points += [
            {"run": group.label, "part": part, "value": mean(values), **end} for part, values in found.items()
        ]
    if not any(point["value"] for point in points):
        return Numbers([], [_undefined(", ".join(keys))])
    return Numbers(points, ["The figure at the end is the median step time, not their sum."] if whole else [])


def pareto(groups: Sequence[Group], memory: str, speed: str) -> Numbers:
    """`run`, `memory`, `speed`, `front`: whether no other run has as little memory and more speed, or the reverse."""
    points: Points = [
        {"run": group.label, "memory": mean(used), "speed": mean(fast)}
        for group in groups
        if (used := _defined(group, memory)) and (fast := _defined(group, speed))
    ]
    for point in points:
        point["front"] = not any(
            other["memory"] <= point["memory"]
            and other["speed"] >= point["speed"]
            and (other["memory"], other["speed"]) != (point["memory"], point["speed"])
            for other in points
        )
    if len(points) < 2:
        return Numbers([], ["Fewer than two runs have both figures."])
    return Numbers(points)


def scaling(groups: Sequence[Group], speed: str) -> Numbers:
    """`run`, `plan`, `ranks`, `share`: speed a device over that on the fewest ranks, along lines of runs (`plan`)."""
    points = []
    for line in lines_over_ranks([group for group in groups if _defined(group, speed)]):
        base = mean(_defined(line[0], speed))
        points += [
            {
                "run": group.label,
                "plan": line[0].label,
                "ranks": group.first.settings["ranks"],
                "share": mean(_defined(group, speed)) / base,
            }
            for group in line
        ]
    return Numbers(points, [] if points else ["No two runs differ in the size of one mesh axis alone."])


def ledger(groups: Sequence[Group]) -> Numbers:
    """`run`, `side` (measured or expected), `part` (axis and collective), `value` in bytes."""
    points: Points = []
    equal: list[str] = []
    unlike: list[str] = []
    unclaimed: list[str] = []
    for group in groups:
        content = group.first.ledger
        if not content.get("measured"):
            continue
        sides = {side: _by_collective(content.get(side) or []) for side in ("measured", "expected")}
        for side, sums in sides.items():
            points += [
                {"run": group.label, "side": side, "part": part, "value": sent} for part, sent in sums.items()
            ]
        where = (
            unclaimed
            if content.get("expected") is None
            else equal
            if sides["measured"] == sides["expected"]
            else unlike
        )
        where.append(group.label)
    if not any(point["value"] for point in points):
        return Numbers(
            [], ["No run sends anything: each is one process, or ended before a step was counted."]
        )
    notes = [f"Measured equals expected to the byte in {len(equal)} of {len(equal) + len(unlike)} runs."]
    notes += [f"Not so: {', '.join(unlike)}."] if unlike else []
    notes += [f"No formula is claimed for {', '.join(unclaimed)}."] if unclaimed else []
    return Numbers(points, notes)


def _curve(run: Run, metric: str) -> dict[float, float]:
    return {
        at: value
        for row in run.rows
        if (at := row.get(X_AXIS)) is not None and (value := row.get(metric)) is not None
    }


def _over_seeds(curves: Sequence[dict[float, float]]) -> Points:
    common = set(curves[0]).intersection(*curves[1:])
    return [{"tokens": at, **_spread([curve[at] for curve in curves])} for at in sorted(common)]


def _spread(values: Sequence[float]) -> dict[str, float]:
    middle = mean(values)
    if len(values) == 1:
        return {"value": middle}
    return {"value": middle, "low": middle - stdev(values), "high": middle + stdev(values)}


def _partner(run: Run, baseline: Group) -> Run | None:
    """The baseline's run from the same seed. Over seeds None without one: what differs then is the seed's doing."""
    seed = run.settings.get(SEED)
    same = (each for each in baseline.runs if each.settings.get(SEED) == seed)
    return next(same, None if baseline.over_seeds else baseline.first)


def _gaps(run: Run, other: Run, metric: str) -> dict[float, float]:
    mine, theirs = _curve(run, metric), _curve(other, metric)
    return {at: abs(mine[at] - theirs[at]) for at in mine if at in theirs}


def _mean_of(gaps: Sequence[dict[float, float]]) -> list[tuple[float, float]]:
    common = set(gaps[0]).intersection(*gaps[1:]) if gaps else set()
    return [(at, mean(gap[at] for gap in gaps)) for at in sorted(common)]


def _drawn(lines: Sequence[tuple[str, Points]], missing: str) -> Numbers:
    """All points where they are few; of many one in so many, which is said."""
    longest = max((len(points) for _, points in lines), default=0)
    if not longest:
        return Numbers([], [missing])
    stride = math.ceil(longest / MOST_POINTS)
    points = [
        {"run": label, **point} for label, line in lines if line for point in [*line[:-1:stride], line[-1]]
    ]
    return Numbers(
        points, [f"Of {longest:,} rows a run, one of every {stride} is drawn."] if stride > 1 else []
    )


def _greatest(lines: Sequence[tuple[str, Points]]) -> Numbers:
    """All points where they are few; of many the greatest of each so many, for none of these should be missed."""
    longest = max(len(points) for _, points in lines)
    stride = math.ceil(longest / MOST_DOTS)
    points = [
        {"run": label, **max(line[i : i + stride], key=lambda point: point["value"])}
        for label, line in lines
        for i in range(0, len(line), stride)
    ]
    return Numbers(
        points, [f"Of each {stride} rows of {longest:,} the greatest is drawn."] if stride > 1 else []
    )


def _defined(group: Group, key: str) -> list[float]:
    return [value for run in group.runs if (value := run.summary.get(key)) is not None]


def _parts(run: Run, key: str) -> list[tuple[str, float]]:
    """`time/data_s` -> data; `memory/at_peak_bytes.*` -> each kind."""
    if key.endswith(".*"):
        return list((run.summary.get(key.removesuffix(".*")) or {}).items())
    value = run.summary.get(key)
    return [] if value is None else [(key.partition("/")[2].removesuffix("_s"), value)]


def _by_collective(entries: Sequence[dict[str, Any]]) -> dict[str, int]:
    sums: dict[str, int] = {}
    for entry in sorted(entries, key=lambda entry: (entry["axis"], entry["collective"])):
        name = f"{entry['axis']} {entry['collective'].replace('_', '-')}"
        sums[name] = sums.get(name, 0) + entry["sent_bytes"]
    return sums


def _undefined(keys: str) -> str:
    why = " It needs the device's peak, which is not known for a CPU." if "mfu" in keys else ""
    return f"No run has {keys}.{why}"
