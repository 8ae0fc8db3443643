"""Labels of runs: the fewest settings that tell them apart."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from tpresearch.compare.runs import SEED, Run
from tpresearch.config.mesh import AXES
from tpresearch.track.shown import UNDEFINED, printable

FIRST = ("model.name", "parallel.name", "ranks", *(f"mesh.{axis}" for axis in reversed(AXES)), "device")
BY_VALUE = ("model.name", "parallel.name", "device")
"""Settings whose value is clear without their name."""


def settings_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run, one column per setting, as text: FIRST ones first, those that some run lacks last."""
    frame = pd.DataFrame([run.settings for run in runs])
    lacking = set(frame.columns[frame.isna().any()]) - set(FIRST)
    keys = [*FIRST, *frame.columns.difference(FIRST, sort=False)]
    keys.sort(key=lambda key: (key == SEED, key in lacking))
    return frame.fillna(UNDEFINED).reindex(columns=keys, fill_value=UNDEFINED)


def differing(runs: Sequence[Run]) -> pd.DataFrame:
    """The columns of `settings_frame` that are not the same in every run."""
    frame = settings_frame(runs)
    return frame.loc[:, frame.nunique() > 1]


def telling(runs: Sequence[Run]) -> list[str]:
    """The differing settings that tell apart what those before them do not.

    For a sweep over plans that is `parallel.name`: what else the plans set follows from it. The device is always among
    them if it differs, so that no chart mixes a GPU and a CPU without saying so.
    """
    frame = differing(runs)
    chosen: list[str] = []
    for key in frame:
        if len(frame[[*chosen, key]].drop_duplicates()) > (
            len(frame[chosen].drop_duplicates()) if chosen else 1
        ):
            chosen.append(key)
    return [*chosen, "device"] if "device" in frame and "device" not in chosen else chosen


def labels(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """A unique label per run: the user's names, else the settings `keys`, else its run name; its folder where needed."""
    given = [(run.config.get("logger") or {}).get("name") for run in runs]
    if all(given) and len(set(given)) == len(runs):
        names = [printable(name) for name in given]
    elif keys:
        names = [" · ".join(_part(key, run.setting(key)) for key in keys) for run in runs]
    else:
        names = [printable(run.summary.get("run_name") or run.summary["parallel"]) for run in runs]
    names = [
        name if run.completed else f"{name} ({printable(run.summary['status'])})"
        for name, run in zip(names, runs, strict=True)
    ]
    count = Counter(names)
    ends = _unique_ends([run.folder for run in runs])
    return [f"{name} · {end}" if count[name] > 1 else name for name, end in zip(names, ends, strict=True)]


def _part(key: str, value: str) -> str:
    if key in BY_VALUE:
        return value
    if key == "ranks":
        return f"{value} rank{'s' if value != '1' else ''}"
    parts = key.split(".")
    return f"{'.'.join(parts[-2:] if len(parts) > 2 else parts[-1:])}={value}"


def _unique_ends(folders: Sequence[Path]) -> list[str]:
    """As many last parts of each path as make all of them different."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts), default=1) + 1):
        ends = [printable("/".join(each[-depth:])) for each in parts]
        if len(set(ends)) == len(ends):
            break
    return ends
