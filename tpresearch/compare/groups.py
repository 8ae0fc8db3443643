"""What is drawn as one curve (a run, or the repetitions of one over seeds), what may be overlaid, and the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tpresearch.compare.labels import labels, settings_frame, telling
from tpresearch.compare.runs import SEED, Run
from tpresearch.config.errors import ConfigError, nearest

SAME = (
    *("tokenizer.kind", "tokenizer.vocab_size", "tokenizer.path", "data.seq_len", "train.global_batch_size"),
    *("train.loss", SEED, "corpus_hash"),
)
"""In these, runs must agree for their losses to be the same quantity; causes before the hash that follows from them."""


@dataclass(frozen=True)
class Group:
    label: str
    runs: list[Run]
    over_seeds: bool = False
    """Whether runs of several seeds are grouped, so that a difference from it is taken seed by seed."""

    @property
    def first(self) -> Run:
        return self.runs[0]


def one_by_one(runs: Sequence[Run], names: Sequence[str]) -> list[Group]:
    """One group per run."""
    return [Group(name, [run]) for run, name in zip(runs, names, strict=True)]


def over_seeds(runs: Sequence[Run]) -> list[Group]:
    """One group per experiment: its runs differ in train.seed alone."""
    repeated: dict[tuple[str, ...], list[Run]] = {}
    settings = settings_frame(runs).drop(columns=SEED, errors="ignore")
    for run, key in zip(runs, settings.itertuples(index=False, name=None), strict=True):
        repeated.setdefault(key, []).append(run)
    firsts = [group[0] for group in repeated.values()]
    names = labels(firsts, [key for key in telling(firsts) if key != SEED])
    return [Group(name, group, over_seeds=True) for name, group in zip(names, repeated.values(), strict=True)]


def baseline_of(groups: Sequence[Group], wanted: str | None) -> Group:
    """The group called `wanted`; by default the first with rows, preferably parallel=none, else on the fewest ranks.

    Raises:
        ConfigError: if no group or several groups have that name.
    """
    if wanted is None:
        return min(
            groups,
            key=lambda group: (
                not any(run.rows for run in group.runs),
                group.first.summary["parallel"] != "none",
                group.first.summary["world_size"],
            ),
        )
    exact = [group for group in groups if group.label == wanted]
    found = exact or [group for group in groups if any(_is_called(run, wanted) for run in group.runs)]
    if len(found) == 1:
        return found[0]
    names = [group.label for group in found] or nearest(wanted, [group.label for group in groups])
    why = f"{len(found)} runs have this name" if found else "no run has this name"
    raise ConfigError("baseline", wanted, why, f"one of: {', '.join(names)}", fix={"baseline": names[0]})


def _is_called(run: Run, name: str) -> bool:
    names = (run.summary["parallel"], run.summary.get("run_name"), run.folder.name)
    return name in names or Path(name).expanduser().resolve() == run.folder.resolve()


def check_comparable(runs: Sequence[Run], names: Sequence[str], *, anyway: bool, any_seed: bool) -> list[str]:
    """One sentence per field of SAME in which runs differ, if they are to be overlaid anyway.

    Raises:
        ConfigError: names the first such field and its runs, unless `anyway`; `any_seed` lets seeds differ.
    """
    labelled = settings_frame(runs).assign(label=names)
    by_value = {key: labelled.groupby(key, sort=False)["label"].agg(list) for key in SAME if key in labelled}
    unlike = {key: some for key, some in by_value.items() if len(some) > 1 and not (any_seed and key == SEED)}
    if anyway:
        return [
            f"{key} differs: {', '.join(f'{value} ({_named(some)})' for value, some in by_value.items())}"
            for key, by_value in unlike.items()
        ]
    if not unlike:
        return []
    key = next(iter(unlike))
    (value, some), (other, odd), *_ = unlike[key].items()
    also = f" (they also differ in {', '.join(list(unlike)[1:])})" if len(unlike) > 1 else ""
    means = "; seeds=mean for their mean and spread" if key == SEED else ""
    raise ConfigError(
        key,
        other,
        f"in {_named(odd)}, but {value} in {_named(some)}: their losses are not comparable{also}",
        f"the same corpus, tokenizer, row length, global batch, loss and seed, or overlay=anyway{means}",
        fix={"seeds": "mean"} if list(unlike) == [SEED] else {"overlay": "anyway"},
    )


def _named(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
