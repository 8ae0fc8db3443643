"""Bounds of numbers, written beside the fields that they bound: `steps: Annotated[int, AtLeast(1)]`.

OmegaConf ignores the annotation (2.3); `check_bounds` holds a typed config to it.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from tpresearch.config.errors import ConfigError
from tpresearch.config.reading import GREATEST, check_sane, check_value


@dataclass(frozen=True)
class Within:
    """Numbers from `least` to `most`; `open_below` and `open_above` leave the bound itself out."""

    least: float = -math.inf
    most: float = math.inf
    open_below: bool = False
    open_above: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.least if self.open_below else number >= self.least
        below = number < self.most if self.open_above else number <= self.most
        return math.isfinite(number) and above and below

    def __str__(self) -> str:
        low = f"{'a number above' if self.open_below else ''} {self.least:g}".strip()
        if self.most in (GREATEST, math.inf):
            return low if self.open_below else f"{low} or more"
        return f"a number {'above' if self.open_below else 'from'} {self.least:g} to {'below ' * self.open_above}{self.most:g}"


def AtLeast(least: int, most: int = GREATEST) -> Within:
    return Within(least, most)


@dataclass(frozen=True)
class Is:
    """The type of a field that is `Any` to OmegaConf, which takes no union of lists."""

    hint: Any


POSITIVE = Within(0, open_below=True)
SHARE = Within(0, 1)
"""A share of something: from 0 to 1."""


def check_bounds(config: Any, prefix: str = "") -> None:
    """Refuse a value that is not what its field declares, and what nothing could work with.

    Raises:
        ConfigError: for the first, in the order of the schema.
    """
    declared = _declared(config.__class__)
    for field in dataclasses.fields(config):
        value, key, declares = getattr(config, field.name), f"{prefix}{field.name}", declared[field.name]
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{key}.")
            continue
        for number in _numbers(value):
            _check_number(key, value, number, next((d for d in declares if isinstance(d, Within)), None))
        for declaration in declares:
            if isinstance(declaration, Is):
                check_value(key, value, declaration.hint)
        if not isinstance(value, dict):  # a model, which its class reads
            check_sane(key, value)


def _check_number(key: str, value: Any, number: float, bound: Within | None) -> None:
    if not math.isfinite(number):
        raise ConfigError(key, value, "not a finite number", str(bound or "a finite number"))
    if bound and number not in bound:
        above = f"above {GREATEST:g}" if number > bound.most >= GREATEST else "out of bounds"
        raise ConfigError(key, value, "too small" if number < bound.least else above, str(bound))


def _numbers(value: Any) -> Iterator[float]:
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, int | float) and not isinstance(item, bool):
            yield item


@cache
def _declared(schema: type) -> dict[str, tuple[Any, ...]]:
    """What is written beside each field of a schema."""
    hints = typing.get_type_hints(schema, include_extras=True)
    return {name: getattr(hint, "__metadata__", ()) for name, hint in hints.items()}
