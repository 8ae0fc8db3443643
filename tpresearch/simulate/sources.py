"""Numbers of a cluster that were changed without a source. Merging configs would leave them that of the number they replace; and
the cluster was checked before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tpresearch.launch.command import is_within, override_key
from tpresearch.simulate.cluster import Cluster, SourceKind

TYPED = "typed on the command line"
HOST = {"devices_per_host": None, "has_switch": True, "shared_cores": None}
"""Keys of a cluster that say what a host is, with what they are where no file states them."""
IN_A_FILE = "changed in {}, which states no source"


def with_own_sources(
    cluster: Cluster, files: Sequence[tuple[str, Mapping[str, Any]]], words: Iterable[str]
) -> Cluster:
    """The cluster, where a number that one of its files changes, another config file or an override, is guessed unless it has
    a source of its own, and where each check names the numbers that were changed since.

    Args:
        files: names and contents of those from which the cluster was merged, each over those before it.
        words: the overrides that were typed.
    """
    values: dict[str, object] = dict(HOST)
    sources: dict[str, str] = {}
    changed: set[str] = set()
    """Numbers, and what a host is, that are not as they were when the cluster was checked."""
    unsourced: dict[str, str] = {}
    """What is said of numbers without a source."""
    for file, content in files:
        numbers = content.get("numbers") or {}
        for name, entry in numbers.items():
            if "value" in entry and (value := _plain(entry["value"])) != values.get(name):
                values[name], unsourced[name] = value, IN_A_FILE.format(file)
                changed.add(name)
            if "source" in entry:
                sources[name] = entry["source"]
                unsourced.pop(name, None)
        for name in HOST.keys() & content.keys():
            if content[name] != values[name]:
                values[name] = content[name]
                changed.add(name)
        if "checked" in content:
            changed.clear()
    typed = {override_key(word) for word in words} - {"cluster"}
    for name, number in cluster.numbers.items():
        key = f"cluster.numbers.{name}"
        differs = not isinstance(values.get(name, ""), str) and values[name] != number.value
        if differs or f"{key}.value" in typed:
            is_typed = any(is_within(f"{key}.value", word) for word in typed)
            unsourced[name] = TYPED if is_typed else IN_A_FILE.format("another config file")
            changed.add(name)
        if f"{key}.source" in typed or sources.get(name, number.source) != number.source:
            unsourced.pop(name, None)
    changed |= {name for name in HOST if values[name] != getattr(cluster, name)}
    numbers = {
        name: replace(number, kind=SourceKind.guessed, source=unsourced[name])
        if name in unsourced
        else number
        for name, number in cluster.numbers.items()
    }
    before = f"before {', '.join(sorted(changed))} changed, " if changed else ""
    return replace(cluster, numbers=numbers, checked=tuple(before + line for line in cluster.checked))


def _plain(value: object) -> object:
    """A number as a cluster has it; text, such as an interpolation, as it is written."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    return float(value) if isinstance(value, int | float) else value
