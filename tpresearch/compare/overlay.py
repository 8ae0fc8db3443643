"""Which runs may be overlaid: those whose losses are the same quantity, over the same tokens in the same order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tpresearch.compare.labels import SEED, shown
from tpresearch.compare.options import Options, Overlay, Seeds
from tpresearch.compare.runs import Run
from tpresearch.config.errors import ConfigError

Field = Callable[[Run], Any]


def _setting(key: str) -> Field:
    return lambda run: run.settings.get(key)


SAME: Mapping[str, Field] = {
    **{key: _setting(key) for key in ("tokenizer.kind", "tokenizer.vocab_size", "tokenizer.path")},
    **{key: _setting(key) for key in ("data.seq_len", "train.global_batch_size", "train.loss", SEED)},
    "corpus_hash": lambda run: run.summary.get("corpus_hash"),
}
"""By the names that a refusal gives them; causes come before the corpus hash, which follows from some of them."""
LEGAL = "runs of one corpus, tokenizer, row length, global batch, loss and seed"


def check(runs: Sequence[Run], labels: Sequence[str], options: Options) -> list[str]:
    """A sentence for each field in which runs differ that should not, where the user will have them overlaid anyway.

    Raises:
        ConfigError: names the first such field and its runs, unless `overlay=anyway`; seeds may differ under `seeds=mean`.
    """
    unlike = {
        name: by_value for name, field in SAME.items() if len(by_value := _by_value(runs, labels, field)) > 1
    }
    if options.seeds is Seeds.mean:
        unlike.pop(SEED, None)
    if options.overlay is Overlay.anyway:
        return [_sentence(name, by_value) for name, by_value in unlike.items()]
    if unlike:
        name, by_value = next(iter(unlike.items()))
        (first, some), (other, odd), *_ = by_value.items()
        also = f" (they differ in {', '.join(list(unlike)[1:])} too)" if len(unlike) > 1 else ""
        raise ConfigError(
            name,
            other,
            f"of {_named(odd)}, beside {first} of {_named(some)}: their curves are not comparable{also}",
            f"{LEGAL}, or overlay=anyway"
            + ("; seeds=mean for their mean and spread" if name == SEED else ""),
            fix={"seeds": "mean"} if list(unlike) == [SEED] else {"overlay": "anyway"},
        )
    return []


def _by_value(runs: Sequence[Run], labels: Sequence[str], field: Field) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for run, label in zip(runs, labels, strict=True):
        values.setdefault(shown(field(run)), []).append(label)
    return values


def _sentence(name: str, by_value: Mapping[str, Sequence[str]]) -> str:
    parts = (f"{value} ({_named(labels)})" for value, labels in by_value.items())
    return f"{name} differs: {', '.join(parts)}"


def _named(labels: Sequence[str], most: int = 3) -> str:
    more = f" and {len(labels) - most} more" if len(labels) > most else ""
    return ", ".join(labels[:most]) + more
