"""Numbers of a cluster that were changed without a source. Merging configs would leave them that of the number they replace; and
the cluster was checked before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tpresearch.launch.command import is_within, override_key
from tpresearch.simulate.cluster import DEFAULTS, Cluster, Number, SourceKind

TYPED = "typed on the command line"
HOST = ("devices_per_host", "has_switch", "shared_cores")
"""Keys of a cluster that say what a host is."""
IN_A_FILE = "changed in {}, which states no source"


def with_own_sources(
    cluster: Cluster, files: Sequence[tuple[str, Mapping[str, Any]]], words: Iterable[str]
) -> Cluster:
    """The cluster, where a number that differs from the one whose source it has is guessed, and where each check names the
    numbers that were changed since.

    Args:
        files: names and contents of those from which the cluster was merged, each over those before it.
        words: the overrides that were typed.
    """
    values: dict[str, object] = {name: DEFAULTS.get(name) for name in HOST}
    when_checked: dict[str, object] = {}
    sourced: dict[str, tuple[object, str]] = {}
    """Each number with its source, where both were last stated."""
    changed_by: dict[str, str] = {}
    for file, content in files:
        for name, entry in (content.get("numbers") or {}).items():
            if "value" in entry:
                values[name], changed_by[name] = _plain(entry["value"]), file
            if "source" in entry:
                sourced[name] = values.get(name), entry["source"]
        values |= {name: content[name] for name in HOST if name in content}
        if "checked" in content:
            when_checked = dict(values)
    typed = {override_key(word) for word in words} - {"cluster"}

    def with_own_source(name: str, number: Number) -> Number:
        value, source = sourced.get(name, (number.value, number.source))
        if number.value == value or number.source != source:
            return number
        file = changed_by[name] if values[name] == number.value else "another config file"
        is_typed = any(is_within(f"cluster.numbers.{name}.value", word) for word in typed)
        label = TYPED if is_typed else IN_A_FILE.format(file)
        return replace(number, kind=SourceKind.guessed, source=label)

    now = {name: number.value for name, number in cluster.numbers.items()}
    now |= {name: getattr(cluster, name) for name in HOST}
    changed = sorted(name for name, value in when_checked.items() if now[name] != value)
    before = f"before {', '.join(changed)} changed, " if changed else ""
    return replace(
        cluster,
        numbers={name: with_own_source(name, number) for name, number in cluster.numbers.items()},
        checked=tuple(before + line for line in cluster.checked),
    )


def _plain(value: object) -> object:
    """A number as a cluster has it."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    return float(value) if isinstance(value, int | float) else value
