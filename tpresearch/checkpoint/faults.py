"""Named points of a save or load at which tests inject failures. Unless one is armed, `point` does nothing."""

from __future__ import annotations

from collections.abc import Callable

armed: Callable[[str], None] | None = None
"""Called with the name of each point that is passed."""


def point(name: str) -> None:
    if armed is not None:
        armed(name)
