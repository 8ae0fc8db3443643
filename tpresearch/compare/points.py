"""Points of a panel: the logged rows of runs as one frame, averaged over seeds, and thinned to what a screen shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from tpresearch.compare.groups import Group
from tpresearch.track.names import X_AXIS
from tpresearch.track.table import SEED


@dataclass(frozen=True)
class PanelData:
    points: pd.DataFrame = field(default_factory=pd.DataFrame)
    """Empty if there is nothing to draw; then `notes` says why."""
    notes: list[str] = field(default_factory=list)


def history(groups: Sequence[Group], metric: str) -> pd.DataFrame:
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


def mean(rows: pd.DataFrame, sizes: Mapping[str, int]) -> pd.DataFrame:
    """The mean over each group's runs, at the tokens that all of them (`sizes`) have."""
    count = rows.groupby(["run", "tokens"])["value"].transform("size")
    return mean_std(rows[count == rows["run"].map(sizes)], ["run", "tokens"])


def mean_std(frame: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """`value` averaged by `keys`; `low` and `high` are one standard deviation from it, where there are several."""
    points = frame.groupby(keys, sort=False)["value"].agg(["mean", "std"]).reset_index()
    points = points.rename(columns={"mean": "value"}).dropna(subset="value")
    spread = points.pop("std")
    if spread.isna().all():
        return points
    return points.assign(low=points["value"] - spread, high=points["value"] + spread)


def in_buckets(points: pd.DataFrame, most: int, drawn: str) -> tuple[list[pd.Series], list[str]]:
    """Keys that group each run's points into at most `most` buckets, and a sentence that says so if any has several."""
    nth = points.groupby("run").cumcount()
    rows = nth.max() + 1
    size = math.ceil(rows / most)
    notes = [f"The {drawn} of every {size} of {rows:,} rows is drawn."] if size > 1 else []
    return [points["run"], nth // size], notes
