"""The numbers of each panel, before anything is drawn: a frame with one row per mark, and sentences about them.

Columns have fixed names (`run`, a group's label, `tokens`, ...); what a user named is only ever a value in them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd

from tpresearch.compare.groups import Comparison, Group, seen_in_losses, settings_frame
from tpresearch.compare.runs import Run
from tpresearch.config.axes import AXIS_NAMES
from tpresearch.track.names import X_AXIS
from tpresearch.track.panels import Panel
from tpresearch.track.table import SEED
from tpresearch.track.text import UNDEFINED

LOSS = "train/loss"
MAX_POINTS = 1000
"""Per curve: about as many as a screen has columns."""
MAX_DOTS = 250
"""Per run in the panel of differences, where each point is a dot."""


@dataclass(frozen=True)
class PanelData:
    points: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Empty if there is nothing to draw; then `notes` says why."""
    notes: list[str] = field(default_factory=list)


def panel_data(panel: Panel, groups: Sequence[Group], comparisons: Sequence[Comparison]) -> PanelData:
    """The data that the panel shows for these runs."""
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
    points = _mean(_history(groups, metric).dropna(), {group.label: len(group.runs) for group in groups})
    if points.empty:
        return PanelData(notes=[f"No run has {metric}."])
    buckets, notes = _buckets(points, MAX_POINTS, "last")
    points = points.groupby(buckets, sort=False).tail(1)
    if "low" in points:
        notes.append("The band is one standard deviation over seeds.")
    early = [group.label for group in groups if not any(run.rows for run in group.runs)]
    notes += [f"Ended before the first row: {', '.join(early)}."] if early else []
    return PanelData(points, notes)


def differences(comparisons: Sequence[Comparison], metric: str) -> PanelData:
    """`run`, `tokens`, `value` = |metric - the baseline's| at the same tokens, `so_far` its running maximum.

    A difference of 0 is given the value of a floor below all others; `exact` is the difference as text.
    """
    compared = [comparison for comparison in comparisons if comparison.others]
    if not compared:
        one = len(comparisons) == 1
        return PanelData(notes=["There is only one run." if one else "Each run is an experiment of its own."])
    lacking = [one.baseline for one in compared if not any(run.rows for run in one.baseline.runs)]
    if len(lacking) == len(compared):
        return PanelData(notes=[f"{each.label} has no rows to compare with." for each in lacking])
    notes = unpaired(compared)
    sizes = {each.label: len(_paired(each, one.baseline)) for one in compared for each in one.others}
    points = _mean(_loss_differences(compared, metric), sizes)
    if points.empty:
        return PanelData(notes=["No run has rows at the baseline's token counts.", *notes])
    notes += [
        f"{group.label} has no rows at the tokens of {comparison.baseline.label}."
        for comparison in compared
        for group in comparison.others
        if _paired(group, comparison.baseline) and group.label not in set(points["run"])
    ]
    undefined = points.loc[points["value"] == math.inf, "run"].value_counts(sort=False)
    notes += [f"{label} has no finite loss in {count} of its rows." for label, count in undefined.items()]
    points = points[points["value"] < math.inf]
    if not points["value"].any():
        finite = "finite " if len(undefined) else ""
        return PanelData(notes=[f"Every {finite}loss equals the baseline's in all digits.", *notes])
    buckets, thinned = _buckets(points, MAX_DOTS, "maximum")
    points = points.loc[points.groupby(buckets, sort=False)["value"].idxmax()]
    floor = points["value"].where(points["value"] > 0).min() / 3
    points["exact"] = [f"{value:.2e}" if value else "0" for value in points["value"]]
    points["value"] = points["value"].clip(lower=floor)
    points["so_far"] = points.groupby("run")["value"].cummax()
    if (points["exact"] == "0").any():
        notes.append("Dots at the bottom are differences of exactly 0, which a log axis cannot show.")
    return PanelData(points, ["One dot per logged step; the line is the running maximum.", *notes, *thinned])


def max_differences(comparisons: Sequence[Comparison]) -> dict[Path, float]:
    """The maximum difference in train/loss of each run from the baseline over all its rows, by folder; none for the baseline's own."""
    return _loss_differences(comparisons, LOSS).groupby("folder", sort=False)["value"].max().to_dict()


def pooled_differences(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """Per plan and `seen_in_losses` over all comparisons: `runs`, `most`, and `rms`, the root of the mean square."""
    apart = seen_in_losses([run for one in comparisons for group in one.groups for run in group.runs])
    kinds: dict[Path, dict[str, object]] = {}
    for one in comparisons:
        for run in (run for group in one.others for run in group.runs):
            pairs = {key: (run.setting(key), one.baseline.first.setting(key)) for key in apart}
            unlike = {key: " against ".join(dict.fromkeys(pair)) for key, pair in pairs.items()}
            plan = {"plan": run.summary["parallel"], "ranks": run.summary["world_size"]}
            kinds[run.folder] = plan | unlike
    rows = _loss_differences(comparisons, LOSS).join(pd.DataFrame.from_dict(kinds, "index"), on="folder")
    rows["square"] = rows["value"] ** 2
    pooled = rows.groupby(["plan", "ranks", *apart], sort=False).agg(
        runs=("folder", "nunique"), most=("value", "max"), rms=("square", "mean")
    )
    return pooled.assign(rms=pooled["rms"] ** 0.5).reset_index()


def unpaired(comparisons: Sequence[Comparison]) -> list[str]:
    """One sentence per group with runs from seeds that the baseline lacks, which differences leave out."""
    sentences = []
    for comparison in comparisons:
        for group in comparison.others:
            paired = _paired(group, comparison.baseline)
            if seeds := list(dict.fromkeys(run.setting(SEED) for run in group.runs if run not in paired)):
                left_out = f"leaves out {SEED}={', '.join(seeds)}, which the baseline has no run of"
                sentences.append(f"The difference of {group.label} {left_out}.")
    return sentences


def bars(groups: Sequence[Group], key: str) -> PanelData:
    """`run`, `value`; over seeds `low` and `high` one standard deviation from it."""
    points = _mean_std(_summary_figures(groups, [key]).rename(columns={key: "value"}), ["run"])
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

    Along a line one mesh axis grows. A run that could be in several is in that of the outermost axis.
    """
    none = PanelData(notes=["No two runs differ only in the size of one mesh axis."])
    if not groups:
        return none
    speeds = _summary_figures(groups, [speed]).groupby("run", sort=False)[speed].mean()
    axes = [f"mesh.{axis}" for axis in AXIS_NAMES]
    left = settings_frame([group.first for group in groups])
    left[axes] = left[axes].replace(UNDEFINED, "1")
    if groups[0].over_seeds:
        left = left.drop(columns=SEED, errors="ignore")
    left = left.assign(run=speeds.index, speed=speeds.values, ranks=left["ranks"].astype(int))
    left = left.dropna(subset="speed").sort_values("ranks", kind="stable")
    lines = []
    for axis in axes:
        alike = left.groupby(list(left.columns.difference(["ranks", axis, "run", "speed"])), sort=False)
        on_line = left[alike["ranks"].transform("nunique") > 1]
        first = alike[["run", "speed"]].transform("first").loc[on_line.index]
        lines.append(on_line.assign(line=first["run"], share=on_line["speed"] / first["speed"]))
        left = left.drop(on_line.index)
    points = pd.concat(lines)
    return none if points.empty else PanelData(points[["run", "line", "ranks", "share"]])


def ledger(groups: Sequence[Group]) -> PanelData:
    """`run`, `side` (measured or expected, or predicted), `part` (axis and collective), `value` in bytes."""
    counted = {group.label: group.first for group in groups if group.first.ledger.get("measured")}
    entries = [
        (label, side, f"{entry['axis']} {entry['collective'].replace('_', '-')}", entry["sent_bytes"])
        for label, run in counted.items()
        for key, side in (("measured", "predicted" if run.is_predicted else "measured"), ("expected",) * 2)
        for entry in run.ledger.get(key) or []
    ]
    points = pd.DataFrame(entries, columns=["run", "side", "part", "value"])
    points = points.groupby(["run", "side", "part"])["value"].sum().reset_index()
    if not points["value"].any():
        why = "No run communicates: each is a single process, or ended before a step was counted."
        return PanelData(notes=[why])
    pivoted = points.pivot(index=["run", "part"], columns="side", values="value")
    sides = pivoted.reindex(columns=["measured", "expected"]).fillna(0)
    equal = (sides["measured"] == sides["expected"]).groupby("run").all()
    measured = [label for label, run in counted.items() if not run.is_predicted]
    claimed = [label for label in measured if counted[label].ledger.get("expected") is not None]
    unlike = [label for label in claimed if not equal[label]]
    unclaimed = [label for label in measured if label not in claimed]
    of = f"{len(claimed) - len(unlike)} of {len(claimed)} runs"
    notes = [f"Measured equals expected to the byte in {of}." if measured else "Predicted, not measured."]
    notes += [f"They differ in {', '.join(unlike)}."] if unlike else []
    notes += [f"There is no formula for {', '.join(unclaimed)}."] if unclaimed else []
    return PanelData(points, notes)


def _history(groups: Sequence[Group], metric: str) -> pd.DataFrame:
    """One row per row that was logged in training; `value` is NaN where the metric is not finite."""
    rows = [
        (group.label, run.folder, run.setting(SEED), row.get(X_AXIS), row.get(metric))
        for group in groups
        for run in group.runs
        if not run.is_predicted
        for row in run.rows
    ]
    columns = ["run", "folder", "seed", "tokens", "value"]
    return pd.DataFrame(rows, columns=columns).astype({"tokens": float, "value": float})


def _loss_differences(comparisons: Sequence[Comparison], metric: str) -> pd.DataFrame:
    """|metric - the baseline's| for each run and tokens (over seeds, of the same seed); infinite where the baseline's alone is finite."""
    found = []
    for comparison in comparisons:
        on = ["seed", "tokens"] if comparison.baseline.over_seeds else ["tokens"]
        base = _history([comparison.baseline], metric).dropna().drop_duplicates(on)[[*on, "value"]]
        found.append(_history(comparison.others, metric).merge(base, on=on))
    pairs = pd.concat(found)
    return pairs.assign(value=(pairs.pop("value_x") - pairs.pop("value_y")).abs().fillna(math.inf))


def _paired(group: Group, baseline: Group) -> list[Run]:
    """The runs that can be compared with a run of the baseline: over seeds, one of the same seed."""
    seeds = {run.setting(SEED) for run in baseline.runs}
    return [run for run in group.runs if not baseline.over_seeds or run.setting(SEED) in seeds]


def _mean(history: pd.DataFrame, sizes: Mapping[str, int]) -> pd.DataFrame:
    """The mean over each group's runs, at the tokens that all of them (`sizes`) have."""
    count = history.groupby(["run", "tokens"])["value"].transform("size")
    return _mean_std(history[count == history["run"].map(sizes)], ["run", "tokens"])


def _mean_std(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """`value` averaged by `keys`; `low` and `high` are one standard deviation from it, where there are several."""
    points = frame.groupby(keys, sort=False)["value"].agg(["mean", "std"]).reset_index()
    points = points.rename(columns={"mean": "value"}).dropna(subset="value")
    spread = points.pop("std")
    if spread.isna().all():
        return points
    return points.assign(low=points["value"] - spread, high=points["value"] + spread)


def _buckets(points: pd.DataFrame, most: int, drawn: str) -> tuple[list[pd.Series], list[str]]:
    """Keys that group each run's points into at most `most` buckets, and a sentence that says so if any has several."""
    nth = points.groupby("run").cumcount()
    rows = nth.max() + 1
    size = math.ceil(rows / most)
    notes = [f"The {drawn} of every {size} of {rows:,} rows is drawn."] if size > 1 else []
    return [points["run"], nth // size], notes


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
