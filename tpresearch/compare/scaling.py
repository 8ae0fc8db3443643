"""Which runs may be joined over ranks: those alike in all but the size of one mesh axis."""

from __future__ import annotations

from collections.abc import Sequence

from tpresearch.compare.groups import Group
from tpresearch.compare.labels import SEED, settings_text
from tpresearch.config.axes import NAMES as AXES


def lines_over_ranks(groups: Sequence[Group]) -> list[list[Group]]:
    """Lines of two groups or more along which one mesh axis grows, by their ranks; no two of one rank count share a line.

    A group is in one line at most: of a grid of tp and dp sizes, in the longer of the two that it could be in.
    """
    candidates = [line for axis in AXES for line in _along(axis, groups)]
    lines: list[list[Group]] = []
    taken: set[int] = set()
    for candidate in sorted(candidates, key=len, reverse=True):
        line = [group for group in candidate if id(group) not in taken]
        if len(line) > 1:
            taken |= {id(group) for group in line}
            lines.append(line)
    order = {id(group): index for index, group in enumerate(groups)}
    return sorted(lines, key=lambda line: order[id(line[0])])


def _along(axis: str, groups: Sequence[Group]) -> list[list[Group]]:
    """Groups that are alike but for the size of this axis; what was run again is in a line of its own."""
    seeds_apart = all(len(group.runs) == 1 for group in groups)
    alike: dict[tuple[object, ...], dict[int, list[Group]]] = {}
    for group in groups:
        ranks = group.first.settings["ranks"]
        key = (_but(axis, group), group.first.settings.get(SEED) if seeds_apart else None)
        alike.setdefault(key, {}).setdefault(ranks, []).append(group)
    return [
        [same[nth] for _, same in sorted(by_ranks.items()) if nth < len(same)]
        for by_ranks in alike.values()
        for nth in range(max(map(len, by_ranks.values())))
    ]


def _but(axis: str, group: Group) -> tuple[tuple[str, str], ...]:
    """All settings but the ranks, the seed and the size of this axis; an axis that a mesh lacks has one rank."""
    left_out = {"ranks", f"mesh.{axis}"}
    sizes = {f"mesh.{other}": "1" for other in AXES}
    settings = sizes | dict(settings_text(group.first, without=SEED))
    return tuple(sorted((key, value) for key, value in settings.items() if key not in left_out))
