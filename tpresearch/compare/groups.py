"""What is drawn as one: a run, or the repetitions of one experiment over seeds; and which of them is the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tpresearch.compare.labels import SEED, labels, settings_text, telling
from tpresearch.compare.runs import Run
from tpresearch.config.errors import ConfigError, nearest


@dataclass(frozen=True)
class Group:
    label: str
    runs: list[Run]
    over_seeds: bool = False
    """Whether runs of several seeds would be in it, so that a difference from it is taken seed by seed."""

    @property
    def first(self) -> Run:
        return self.runs[0]


def one_by_one(runs: Sequence[Run], names: Sequence[str]) -> list[Group]:
    return [Group(name, [run]) for run, name in zip(runs, names, strict=True)]


def over_seeds(runs: Sequence[Run]) -> list[Group]:
    """Runs that differ in train.seed alone together; of one seed that was run twice, both."""
    repeated: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        repeated.setdefault(settings_text(run, without=SEED), []).append(run)
    firsts = [each[0] for each in repeated.values()]
    keys = [key for key in telling(firsts) if key != SEED]
    return [
        Group(name, each, over_seeds=True)
        for name, each in zip(labels(firsts, keys), repeated.values(), strict=True)
    ]


def baseline_of(groups: Sequence[Group], wanted: str | None) -> Group:
    """The one that is asked for; without a wish, of those with rows, one with no plan, else one of the fewest ranks.

    Raises:
        ConfigError: for a name that none has, and one that several have.
    """
    if wanted is None:
        return min(
            groups,
            key=lambda group: (
                not any(run.rows for run in group.runs),
                group.first.summary["parallel"] != "none",
                group.first.settings["ranks"],
            ),
        )
    exact = [group for group in groups if group.label == wanted]
    found = exact or [group for group in groups if any(_is_called(run, wanted) for run in group.runs)]
    names = [group.label for group in groups]
    if not found:
        near = nearest(wanted, names)
        raise ConfigError(
            "baseline",
            wanted,
            "no run has this name",
            f"one of: {', '.join(near)}",
            fix={"baseline": near[0]},
        )
    if len(found) > 1:
        named = [group.label for group in found]
        why = f"{len(found)} runs are called so"
        raise ConfigError("baseline", wanted, why, f"one of: {', '.join(named)}", fix={"baseline": named[0]})
    return found[0]


def _is_called(run: Run, name: str) -> bool:
    if name in (run.summary["parallel"], run.summary.get("run_name"), run.folder.name):
        return True
    return Path(name).expanduser().resolve() == run.folder.resolve()
