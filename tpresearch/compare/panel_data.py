"""The numbers of each panel, before anything is drawn: a frame with one row per mark, and sentences about them.

Columns have fixed names (`run`, a group's label, `tokens`, ...); what a user named is only ever a value in them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from tpresearch.compare.differences import differences
from tpresearch.compare.groups import MESH_COLUMNS, Comparison, Group, settings_frame
from tpresearch.compare.points import PanelData, history, in_buckets, mean, mean_std
from tpresearch.compare.runs import Run
from tpresearch.track.panels import Panel
from tpresearch.track.table import SEED

HELD_OUT = "val/loss"
BATCH = "train.global_batch_size"
MAX_POINTS = 1000
"""Per curve: about as many as a screen has columns."""


def panel_data(panel: Panel, groups: Sequence[Group], comparisons: Sequence[Comparison]) -> PanelData:
    match panel.kind:
        case "curve":
            return curves(groups, panel.metrics[0])
        case "difference":
            return differences(comparisons, panel.metrics[0])
        case "bars":
            return bars(groups, panel.metrics[0])
        case "parts":
            return parts(groups, panel.metrics, panel.total)
        case "pareto":
            return pareto(groups, *panel.metrics)
        case "scaling":
            return scaling(groups, panel.metrics[0])
        case "ledger":
            return ledger(groups)


def curves(groups: Sequence[Group], metric: str) -> PanelData:
    """`run`, `tokens`, `value`; over seeds their mean, and `low`, `high` one standard deviation from it."""
    points = mean(history(groups, metric).dropna(), {group.label: len(group.runs) for group in groups})
    if points.empty:
        return PanelData(notes=[f"No run has {metric}."])
    buckets, notes = in_buckets(points, MAX_POINTS, "last")
    points = points.groupby(buckets, sort=False).tail(1)
    if "low" in points:
        notes.append("The band is one standard deviation over seeds.")
    notes += unlike_rows(groups) if metric == HELD_OUT else []
    early = [group.label for group in groups if not any(run.rows for run in group.runs)]
    notes += [f"Ended before the first row: {', '.join(early)}."] if early else []
    return PanelData(points, notes)


def unlike_rows(groups: Sequence[Group]) -> list[str]:
    """One sentence if the held-out losses are of different numbers of rows, and so are not one quantity."""
    of: dict[int, list[str]] = {}
    for group in groups:
        for rows in dict.fromkeys(run.summary.get("held_out_rows") for run in group.runs):
            if rows:
                of.setdefault(rows, []).append(group.label)
    found = [f"{rows:,} ({', '.join(names)})" for rows, names in of.items()]
    return [f"Held-out losses are of different numbers of rows: {', '.join(found)}."] if len(of) > 1 else []


def bars(groups: Sequence[Group], key: str) -> PanelData:
    """`run`, `value`; over seeds `low` and `high` one standard deviation from it."""
    points = mean_std(_summary_figures(groups, [key]).rename(columns={key: "value"}), ["run"])
    return PanelData(points) if len(points) else PanelData(notes=[_undefined(key)])


def parts(groups: Sequence[Group], keys: Sequence[str], whole: str | None = None) -> PanelData:
    """`run`, `part`, `value`, and `whole` where that key is given; a key that ends in `.*` stands for all below it."""
    figures = _summary_figures(groups, [*keys, *([whole] if whole else [])])
    means = figures.groupby("run", sort=False).mean()
    ends = means.pop(whole) if whole else None
    points = means.melt(var_name="part", ignore_index=False).dropna().reset_index()
    if not points["value"].any():
        return PanelData(notes=[_undefined(", ".join(keys))])
    # `time/data_s` -> data; `memory/at_peak_bytes.gradients` -> gradients
    names = points["part"]
    points["part"] = [key.partition("." if "." in key else "/")[2].removesuffix("_s") for key in names]
    if ends is None:
        return PanelData(points)
    points["whole"] = points["run"].map(ends)
    return PanelData(points, ["The figure at the end is the median step time, not the sum of the phases."])


def pareto(groups: Sequence[Group], memory: str, speed: str) -> PanelData:
    """`run`, `memory`, `speed`, `front`: whether no run with as little memory is as fast."""
    means = _summary_figures(groups, [memory, speed]).groupby("run", sort=False).mean().dropna()
    points = means.set_axis(["memory", "speed"], axis="columns").reset_index()
    if len(points) < 2:
        return PanelData(notes=["Fewer than two runs have both figures."])
    fastest = points.sort_values(["memory", "speed"], ascending=[True, False])["speed"]
    return PanelData(points.assign(front=fastest > fastest.cummax().shift(fill_value=-math.inf)))


def scaling(groups: Sequence[Group], speed: str) -> PanelData:
    """`run`, `line` (its first run), `ranks`, `share`: speed per device over that on the line's fewest ranks.

    Along a line one mesh axis grows, and the global batch is the same; of runs that are in no such line, the rows per rank are
    (weak scaling). A run that could be in several is in that of the outermost axis.
    """
    speeds = _summary_figures(groups, [speed]).groupby("run", sort=False)[speed].mean()
    left = settings_frame([group.first for group in groups])
    if groups[0].over_seeds:
        left = left.drop(columns=SEED, errors="ignore")
    left = left.assign(run=speeds.index, speed=speeds.values, ranks=left["ranks"].astype(int))
    left = left.dropna(subset="speed").sort_values("ranks", kind="stable")
    strong = _lines(left)
    rest = left.drop(strong.index)
    weak = _lines(rest.assign(**{BATCH: pd.to_numeric(rest[BATCH], errors="coerce") / rest["ranks"]}))
    points = pd.concat([strong, weak])
    if points.empty:
        return PanelData(notes=["No two runs differ only in the size of one mesh axis."])
    grown = "Along lines of {} the global batch grows with the ranks: weak scaling."
    notes = [grown.format(", ".join(dict.fromkeys(weak["line"])))] if len(weak) else []
    return PanelData(points[["run", "line", "ranks", "share"]], notes)


def _lines(left: pd.DataFrame) -> pd.DataFrame:
    """The runs that differ from another only in the size of one mesh axis, with their `line` and `share`."""
    lines = []
    for axis in MESH_COLUMNS:
        alike = left.groupby(list(left.columns.difference(["ranks", axis, "run", "speed"])), sort=False)
        on_line = left[alike["ranks"].transform("nunique") > 1]
        first = alike[["run", "speed"]].transform("first").loc[on_line.index]
        lines.append(on_line.assign(line=first["run"], share=on_line["speed"] / first["speed"]))
        left = left.drop(on_line.index)
    return pd.concat(lines)


def ledger(groups: Sequence[Group]) -> PanelData:
    """`run`, `side` (measured or expected, or predicted), `part` (axis and collective), `value` in bytes."""
    entries = [
        (group.label, side, part, value)
        for group in groups
        if (run := group.first).ledger.get("measured")
        for key, side in (("measured", "predicted" if run.is_predicted else "measured"), ("expected",) * 2)
        for part, value in sorted(_sent_bytes(run, key).items())
    ]
    points = pd.DataFrame(entries, columns=["run", "side", "part", "value"])
    if not points["value"].any():
        why = "No run communicates: each is a single process, or ended before a step was counted."
        return PanelData(notes=[why])
    counted = [(group.label, run) for group in groups for run in group.runs if run.ledger.get("measured")]
    measured = [(label, run) for label, run in counted if not run.is_predicted]
    claimed = [(label, run) for label, run in measured if run.ledger.get("expected") is not None]
    equal = [_sent_bytes(run, "measured") == _sent_bytes(run, "expected") for _, run in claimed]
    of = f"{sum(equal)} of {len(claimed)} runs"
    notes = [f"Measured equals expected to the byte in {of}." if measured else "Predicted, not measured."]
    unlike = dict.fromkeys(label for (label, _), same in zip(claimed, equal, strict=True) if not same)
    notes += [f"They differ in {', '.join(unlike)}."] if unlike else []
    unclaimed = dict.fromkeys(label for label, run in measured if run.ledger.get("expected") is None)
    notes += [f"There is no formula for {', '.join(unclaimed)}."] if unclaimed else []
    return PanelData(points, notes)


def _sent_bytes(run: Run, key: str) -> Counter[str]:
    """Bytes by axis and collective, as `measured` or `expected`."""
    found = Counter[str]()
    for entry in run.ledger.get(key) or []:
        found[f"{entry['axis']} {entry['collective'].replace('_', '-')}"] += entry["sent_bytes"]
    return found


def _summary_figures(groups: Sequence[Group], keys: Sequence[str]) -> pd.DataFrame:
    """One row per run with these keys of its summary; in place of a key that ends in `.*` all below it."""
    summaries = pd.json_normalize([run.summary for group in groups for run in group.runs])
    columns, found = list(map(str, summaries)), list[str]()
    for key in keys:
        found += [name for name in columns if name.startswith(key[:-1])] if key.endswith(".*") else [key]
    figures = summaries.reindex(columns=found).apply(pd.to_numeric)
    return figures.assign(run=[group.label for group in groups for _ in group.runs])


def _undefined(keys: str) -> str:
    why = " It needs the device's peak, which is not known for a CPU." if "mfu" in keys else ""
    return f"No run has {keys}.{why}"
