"""Groups of runs that are drawn as one curve (a run, or its repetitions over seeds), their labels and baselines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from tpresearch.compare.runs import Run, budget_of
from tpresearch.config.axes import AXIS_NAMES
from tpresearch.config.choices import ScheduleName
from tpresearch.config.comparable import experiment_config
from tpresearch.config.errors import ConfigError
from tpresearch.config.near_names import nearest
from tpresearch.track.table import SEED
from tpresearch.track.text import UNDEFINED, path_text, printable

OF_THE_CORPUS = ("data.max_tokens", "data.held_out_every", "corpus_hash", "unigram_entropy")
"""Settings of what is read, which a predicted step does not."""
MUST_MATCH = (
    *("tokenizer.kind", "tokenizer.vocab_size", "tokenizer.path", "data.seq_len", "train.global_batch_size"),
    *("train.loss", SEED, *OF_THE_CORPUS),
)
"""Settings in which runs must agree for their losses to be the same quantity; causes before what follows from them."""
MESH_COLUMNS = tuple(f"mesh.{axis}" for axis in AXIS_NAMES)
FIRST_COLUMNS = ("model.name", "parallel.name", "ranks", *MESH_COLUMNS[::-1], "device")
NUMERICS = ("dtype", "weights", "float8", "loss_chunk")
"""Keys of train that change only the rounding of a loss, which a comparison shows, as optimizer.moment_dtype does."""
ALWAYS_SHOWN = ("device", "train.dtype", "train.weights", "train.float8", "optimizer.moment_dtype")
"""Settings that a label shows wherever they differ, even if others tell the runs apart."""
BY_VALUE = ("model.name", "parallel.name", "device", "optimizer.name", "schedule.name")
"""Settings whose value is clear without their name."""


def settings_frame(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per run, one column per setting, as text: FIRST ones first, those that some run lacks and the seed last."""
    frame = pd.DataFrame([run.settings for run in runs])
    lacking = set(frame.columns[frame.isna().any()]) - set(FIRST_COLUMNS)
    keys = [*FIRST_COLUMNS, *(key for key in frame if key not in FIRST_COLUMNS)]
    keys.sort(key=lambda key: (key == SEED, key in lacking))
    return frame.fillna(UNDEFINED).reindex(columns=keys, fill_value=UNDEFINED)


def differing(runs: Sequence[Run]) -> pd.DataFrame:
    """The columns of `settings_frame` that are not the same in every run."""
    frame = settings_frame(runs)
    return frame.loc[:, frame.nunique() > 1]


def seen_in_losses(runs: Sequence[Run]) -> list[str]:
    """The differing settings by which losses of one experiment differ by more than a plan's rounding."""
    return [key for key in map(str, differing(runs)) if key in ALWAYS_SHOWN or key.startswith("defects.")]


def distinguishing(runs: Sequence[Run]) -> list[str]:
    """The differing settings that distinguish runs which those before them do not.

    For a sweep over plans that is `parallel.name`: what else the plans set follows from it. Device and dtypes are always
    among them if they differ, so that no chart mixes a GPU and a CPU, or float32 and bfloat16, without saying so.
    """
    frame = differing(runs)
    chosen: list[str] = []
    kinds = 1
    for key in map(str, frame):
        if (more := len(frame[[*chosen, key]].drop_duplicates())) > kinds:
            chosen, kinds = [*chosen, key], more
    return [*chosen, *(key for key in ALWAYS_SHOWN if key in frame and key not in chosen)]


def labels(runs: Sequence[Run]) -> list[str]:
    """A unique label per run: the user's names, else what is `distinguishing`, else run names; with its folder if needed."""
    keys = distinguishing(runs)
    given = [(run.config.get("logger") or {}).get("name") for run in runs]
    if all(given) and len(set(given)) == len(runs):
        names = [printable(name) for name in given]
    elif keys:
        names = [" · ".join(_part(key, run.setting(key)) for key in keys) for run in runs]
    else:
        names = [printable(run.summary.get("run_name") or run.summary["parallel"]) for run in runs]
    states = ["predicted" if run.is_predicted else printable(run.summary["status"]) for run in runs]
    names = [
        name if state == "completed" or f"({state})" in name else f"{name} ({state})"
        for name, state in zip(names, states, strict=True)
    ]
    parts = [run.folder.resolve().parts for run in runs]
    longest = max(map(len, parts), default=1)
    depth = next((n for n in range(1, longest) if len({each[-n:] for each in parts}) == len(parts)), longest)
    ends = (printable("/".join(each[-depth:])) for each in parts)
    with_ends = zip(names, ends, strict=True)
    return [f"{name} · {end}" if names.count(name) > 1 else name for name, end in with_ends]


def _part(key: str, value: str) -> str:
    if key in BY_VALUE:
        return value
    if key == "ranks":
        return f"{value} rank{'s' if value != '1' else ''}"
    parts = key.split(".")
    return f"{'.'.join(parts[-2:] if len(parts) > 2 else parts[-1:])}={value}"


@dataclass(frozen=True)
class Group:
    label: str
    runs: list[Run]
    over_seeds: bool = False
    """Whether runs of several seeds are grouped, so that a difference from it is taken seed by seed."""

    @property
    def first(self) -> Run:
        return self.runs[0]


def group_each_run(runs: Sequence[Run]) -> list[Group]:
    return [Group(name, [run]) for run, name in zip(runs, labels(runs), strict=True)]


def group_over_seeds(runs: Sequence[Run]) -> list[Group]:
    """One group per experiment: its runs differ in train.seed alone."""
    repeated: dict[tuple[str, ...], list[Run]] = {}
    settings = settings_frame(runs).drop(columns=SEED, errors="ignore")
    for run, key in zip(runs, settings.itertuples(index=False, name=None), strict=True):
        repeated.setdefault(key, []).append(run)
    names = labels([group[0] for group in repeated.values()])
    return [Group(name, group, over_seeds=True) for name, group in zip(names, repeated.values(), strict=True)]


def last_of_each_seed(runs: Sequence[Run]) -> tuple[list[Run], list[str]]:
    """The runs without those that a later one of the same experiment and seed repeats, which in a mean would count twice; and a
    sentence for each that is left out."""
    keys = list(settings_frame(runs).itertuples(index=False, name=None))
    last = dict(zip(keys, runs, strict=True))
    left_out = [
        f"{path_text(run.folder)}: {path_text(last[key].folder)} repeats it, and a mean counts each {SEED} once"
        for run, key in zip(runs, keys, strict=True)
        if run is not last[key]
    ]
    return list(last.values()), left_out


def has_repeats(runs: Sequence[Run]) -> bool:
    """Whether an experiment was completed with several seeds."""
    completed = [run for run in runs if run.completed]
    return any(len({run.setting(SEED) for run in group.runs}) > 1 for group in group_over_seeds(completed))


@dataclass(frozen=True)
class Comparison:
    """Groups of one experiment, and the one that the losses of the others are compared with."""

    groups: list[Group]
    baseline: Group

    @property
    def others(self) -> list[Group]:
        return [group for group in self.groups if group is not self.baseline]


def comparisons_of(groups: Sequence[Group], wanted: str | None = None) -> list[Comparison]:
    """Groups by what determines the loss: a sweep of plans and learning rates has one comparison per learning rate.

    Args:
        wanted: the baseline of all groups, whatever they compute; refused if no group or several have that name.
    """
    if wanted is not None:
        return [Comparison(list(groups), _find_baseline(groups, wanted))]
    alike: dict[str, list[Group]] = {}
    for group in [group for group in groups if not group.first.is_predicted] or groups:
        alike.setdefault(_determines_loss(group), []).append(group)
    return [Comparison(each, _best_baseline(each)) for each in alike.values()]


def _determines_loss(group: Group) -> str:
    """A key that is equal for runs whose losses should be equal, to rounding."""
    kept = experiment_config(group.first.config)
    kept.pop("defects", None)  # a mistake's effect is seen by comparison with the run without it
    without = {*NUMERICS, *(["seed"] if group.over_seeds else [])}
    kept["train"] = {key: value for key, value in kept["train"].items() if key not in without}
    kept["optimizer"] = {key: value for key, value in kept["optimizer"].items() if key != "moment_dtype"}
    if kept["schedule"].get("name") != ScheduleName.constant:
        # A step's learning rate depends on it.
        kept["budget"] = [budget_of(group.first.config), *group.first.earlier_budgets]
    if weights := group.first.summary.get("initial_weights"):
        kept["init_from"] = weights  # whatever the path, where others may be by now
    return json.dumps([kept, group.first.setting("corpus_hash")], sort_keys=True, default=str)


def _best_baseline(groups: Sequence[Group]) -> Group:
    """The first with rows, preferably parallel=none, else on the fewest ranks."""

    def order(group: Group) -> tuple[bool, bool, int]:
        summary, has_rows = group.first.summary, any(run.rows for run in group.runs)
        return not has_rows, summary["parallel"] != "none", summary["world_size"]

    return min(groups, key=order)


def _find_baseline(groups: Sequence[Group], wanted: str) -> Group:
    def is_called(run: Run) -> bool:
        names = (run.summary["parallel"], run.summary.get("run_name"), run.folder.name)
        return wanted in names or Path(os.path.expanduser(wanted)).resolve() == run.folder.resolve()

    exact = [group for group in groups if group.label == wanted]
    found = exact or [group for group in groups if any(map(is_called, group.runs))]
    if len(found) == 1:
        return found[0]
    names = [group.label for group in found] or nearest(wanted, [group.label for group in groups])
    why = f"{len(found)} runs have this name" if found else "no run has this name"
    raise ConfigError("baseline", wanted, why, f"one of: {', '.join(names)}", fix={"baseline": names[0]})


def check_comparable(runs: Sequence[Run], *, anyway: bool, any_seed: bool) -> list[str]:
    """One sentence per field of MUST_MATCH in which runs differ, if they are overlaid `anyway`; otherwise refuses them for the first.
    `any_seed` lets seeds differ. Predictions among themselves may differ in all: they have no losses.
    """
    if all(run.is_predicted for run in runs):
        return []
    labelled = settings_frame(runs).assign(label=labels(runs))
    read = labelled[[not run.is_predicted for run in runs]]
    frames = {key: read if key in OF_THE_CORPUS else labelled for key in MUST_MATCH if key in labelled}
    by_value = {key: frame.groupby(key, sort=False)["label"].agg(list) for key, frame in frames.items()}
    unlike = {key: some for key, some in by_value.items() if len(some) > 1 and not (any_seed and key == SEED)}
    if anyway:
        return [
            f"{key} differs: {', '.join(f'{value} ({_join_names(some)})' for value, some in by_value.items())}"
            for key, by_value in unlike.items()
        ]
    if not unlike:
        return []
    key = next(iter(unlike))
    (value, some), (other, odd), *_ = unlike[key].items()
    also = f" (they also differ in {', '.join(list(unlike)[1:])})" if len(unlike) > 1 else ""
    means = "; seeds=mean for their mean and spread" if key == SEED else ""
    why = f"in {_join_names(odd)}, but {value} in {_join_names(some)}: their losses are not comparable{also}"
    legal = f"the same corpus, tokenizer, row length, global batch, loss and seed, or overlay=anyway{means}"
    fix = {"seeds": "mean"} if list(unlike) == [SEED] else {"overlay": "anyway"}
    raise ConfigError(key, other, why, legal, fix=fix)


def _join_names(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
