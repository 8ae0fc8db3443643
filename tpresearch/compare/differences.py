"""Differences of losses from the baseline's: for their panel, for the table of runs, and over all experiments of a sweep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tpresearch.compare.groups import Comparison, Group, seen_in_losses
from tpresearch.compare.points import PanelData, history, in_buckets, mean
from tpresearch.compare.runs import Run
from tpresearch.track.table import SEED

LOSS = "train/loss"
MAX_DOTS = 250
"""Per run in the panel of differences, where each point is a dot."""


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
    points = mean(_loss_differences(compared, metric), sizes)
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
    buckets, thinned = in_buckets(points, MAX_DOTS, "maximum")
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


def _loss_differences(comparisons: Sequence[Comparison], metric: str) -> pd.DataFrame:
    """|metric - the baseline's| for each run and tokens (over seeds, of the same seed); infinite where the baseline's alone is finite."""
    found = []
    for comparison in comparisons:
        on = ["seed", "tokens"] if comparison.baseline.over_seeds else ["tokens"]
        base = history([comparison.baseline], metric).dropna()[[*on, "value"]]
        found.append(history(comparison.others, metric).merge(base, on=on))
    pairs = pd.concat(found)
    return pairs.assign(value=(pairs.pop("value_x") - pairs.pop("value_y")).abs().fillna(math.inf))


def _paired(group: Group, baseline: Group) -> list[Run]:
    """The runs that can be compared with a run of the baseline: over seeds, one of the same seed."""
    seeds = {run.setting(SEED) for run in baseline.runs}
    return [run for run in group.runs if not baseline.over_seeds or run.setting(SEED) in seeds]
