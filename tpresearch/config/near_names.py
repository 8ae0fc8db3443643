"""The known name that a wrong one was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names, those that look most like `name` first; of very many the three closest, or a few."""
    likeness = {other: difflib.SequenceMatcher(None, name, other).ratio() for other in sorted(set(known))}
    names = sorted(likeness, key=lambda other: -likeness[other])
    alike = [other for other in names if likeness[other] >= 0.6]
    return names if len(names) <= 10 else alike[:3] or names[:8]


def close_names(name: str, known: Iterable[str]) -> list[str]:
    """The known names that this one was likely meant to be, the likeliest first; none if no name is close.

    Of a dotted key whose branch exists only the last part counts: a long branch makes all of its keys look alike.
    A key typed without its branch, such as `lr`, is found under the branch that has it.
    """
    branch, _, last = name.rpartition(".")
    names = sorted((other for other in known if not name.startswith(f"{other}.")), key=len)
    siblings = {other.rpartition(".")[2]: other for other in names if other.rpartition(".")[0] == branch}
    if alike := _similar_names(last, siblings):
        return [siblings[other] for other in alike]
    if branch and siblings:
        return []
    elsewhere = [other for other in names if other.endswith(f".{last}")]
    elsewhere.sort(key=lambda other: -difflib.SequenceMatcher(None, name, other).ratio())
    return elsewhere or difflib.get_close_matches(name, names, n=3, cutoff=0.7)


def closest_name(name: str, known: Iterable[str]) -> str | None:
    """The likeliest of `close_names`, if any."""
    return next(iter(close_names(name, known)), None)


def _similar_names(name: str, known: Iterable[str]) -> list[str]:
    """Names that have this one as their end (`batch_size`), that are alike, or that one abbreviates the other (`lr`)."""
    names = sorted(known)
    ends = [other for other in names if other.endswith(f"_{name}")]
    alike = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    short = [other for other in names if other == _initials(name) or name == _initials(other)]
    return list(dict.fromkeys([*ends, *alike, *short]))


def _initials(name: str) -> str:
    return "".join(part[:1] for part in name.split("_"))
