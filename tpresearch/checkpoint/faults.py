"""Named points of a save or load at which tests inject failures. Unless one is armed, `fault_point` does nothing."""

from __future__ import annotations

from collections.abc import Callable

armed: Callable[[str], None] | None = None
"""Called with the name of each point that is reached."""


def fault_point(name: str) -> None:
    if armed is not None:
        armed(name)
