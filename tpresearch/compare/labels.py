"""What runs are called: by the settings in which they differ, as few of them as tell them apart."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpresearch.compare.runs import Run
from tpresearch.track.shown import UNDEFINED

FIRST = ("model.name", "parallel.name", "ranks", "mesh.tp", "mesh.dp_shard", "mesh.dp_replicate", "device")
SEED = "train.seed"
BY_VALUE = ("model.name", "parallel.name", "device")
"""Settings whose value alone says what they are."""


def differing(runs: Sequence[Run]) -> list[str]:
    """All settings that are not the same in every run: what is asked first comes first, what some run lacks last."""
    keys = dict.fromkeys([*FIRST, *(key for run in runs for key in run.settings)])
    unlike = [key for key in keys if len({_text(run, key) for run in runs}) > 1]
    in_all = {key for key in keys if all(key in run.settings for run in runs)}
    return sorted(unlike, key=lambda key: (key == SEED, key not in FIRST and key not in in_all))


def telling(runs: Sequence[Run]) -> list[str]:
    """Those of the differing settings that tell apart what the ones before them do not.

    Of a sweep over plans that is `parallel.name`: whatever else the plans set follows from it.
    The device is among them wherever it differs, for no chart may mix a GPU and a CPU unsaid.
    """
    chosen: list[str] = []
    groups = {tuple[str, ...]()}
    unlike = differing(runs)
    for key in unlike:
        finer = {tuple(_text(run, each) for each in [*chosen, key]) for run in runs}
        if len(finer) > len(groups):
            chosen, groups = [*chosen, key], finer
    return [*chosen, "device"] if "device" in unlike and "device" not in chosen else chosen


def labels(runs: Sequence[Run], keys: Sequence[str]) -> list[str]:
    """A name for each run, no two alike: given by the user, or by `keys`, or by its summary; then by its folder."""
    given = [(run.config.get("logger") or {}).get("name") for run in runs]
    if all(given) and len(set(given)) == len(runs):
        names = [_printable(str(name)) for name in given]
    elif keys:
        names = [" · ".join(_part(key, run.settings.get(key)) for key in keys) for run in runs]
    else:
        names = [_printable(str(run.summary.get("run_name") or run.summary["parallel"])) for run in runs]
    names = [
        name if run.completed else f"{name} ({run.summary['status']})"
        for name, run in zip(names, runs, strict=True)
    ]
    often = Counter(names)
    where = _apart([run.folder for run in runs])
    return [
        f"{name} · {where[run.folder]}" if often[name] > 1 else name
        for name, run in zip(names, runs, strict=True)
    ]


def _part(key: str, value: Any) -> str:
    if key in BY_VALUE:
        return shown(value)
    if key == "ranks":
        return f"{value} rank{'s' if value != 1 else ''}"
    parts = key.split(".")
    return f"{'.'.join(parts[-2:] if len(parts) > 2 else parts[-1:])}={shown(value)}"


def shown(value: Any) -> str:
    """A setting as it would be typed; what a run does not have is a dash."""
    if value is None:
        return UNDEFINED
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False)
    return _printable(str(value))


def _printable(text: str) -> str:
    """On one line, and with nothing in it that a terminal would obey."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def settings_text(run: Run, without: str) -> tuple[tuple[str, str], ...]:
    """All settings but one, to be compared as a whole."""
    return tuple(sorted((key, shown(value)) for key, value in run.settings.items() if key != without))


def _text(run: Run, key: str) -> str:
    return shown(run.settings.get(key))


def _apart(folders: Sequence[Path]) -> dict[Path, str]:
    """As much of each folder's end as no other folder ends in."""
    whole = {folder: folder.resolve().parts for folder in folders}
    for depth in range(1, max(map(len, whole.values()), default=1) + 1):
        ends = {folder: "/".join(parts[-depth:]) for folder, parts in whole.items()}
        if len(set(ends.values())) == len(folders):
            break
    return ends
