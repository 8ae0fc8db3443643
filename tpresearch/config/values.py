"""Values of config keys: bounds, types of fields that the schema leaves to YAML, and classes by import path.

OmegaConf ignores annotations such as `steps: Annotated[int, AtLeast(1)]` (2.3); `check_bounds` holds a typed config to them.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import unicodedata
from dataclasses import dataclass
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from tpresearch.config.errors import ConfigError

MAX_NUMBER = 10**15
"""Maximum of any count, length or size: a mistyped one would overflow, or never end."""
UNPRINTABLE = ("Cc", "Cs")
"""Unicode categories: control characters, and bytes that were not UTF-8."""

TYPE_NAMES: dict[Any, str] = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}
TYPE_NAMES |= {NoneType: "null", list: "a list", dict: "a dict"}
Base = TypeVar("Base")


def check_value(key: str, value: object, hint: Any) -> None:
    """Refuse a value that is not of the type that `hint` describes, or that nothing could work with.

    Args:
        hint: a type hint of plain types, enums, lists, dicts by name, and unions; any other is ignored.
    """
    if not _has_type(value, hint):
        raise ConfigError(key, value, "of the wrong type", describe_type(hint))
    check_usable(key, value)


def check_usable(key: str, value: object) -> None:
    """Refuse numbers that are not finite or beyond use, and text that no file system and no record would take."""
    if isinstance(value, dict):
        for name, item in value.items():
            check_usable(f"{key}.{name}", name)
            check_usable(f"{key}.{name}", item)
    elif isinstance(value, list):
        for item in value:
            check_usable(key, item)
    elif isinstance(value, str):
        if any(unicodedata.category(char) in UNPRINTABLE for char in value):
            raise ConfigError(key, ascii(value), "it has control characters", "text on one line")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, value, "not a finite number", "a finite number")
    elif isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise ConfigError(key, value, "out of bounds", f"a whole number up to {number_text(MAX_NUMBER)}")


def number_text(number: float) -> str:
    """1e6 -> `1,000,000`, 1e-12 -> `1e-12`."""
    return f"{number:,.0f}" if abs(number) >= 1e5 and float(number).is_integer() else f"{number:g}"


def describe_type(hint: Any) -> str:
    """A type hint in words: "a list of text", "a whole number or null"."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(describe_type(one) for one in inner)
    if kind is list and inner:
        return f"a list of {describe_type(inner[0])}"
    if kind is dict and inner:
        return f"a dict, each of its values {describe_type(inner[1])}"
    if _is_enum(kind):
        return "one of " + ", ".join(f"{kind.__name__}.{name}" for name in kind.__members__)
    if dataclasses.is_dataclass(kind):
        return f"a {kind.__name__}"
    return TYPE_NAMES.get(kind, "a value")


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _has_type(value: object, hint: Any) -> bool:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_has_type(value, one) for one in inner)
    if kind is list:
        return isinstance(value, list) and all(_has_type(item, one) for item in value for one in inner)
    if kind is dict:
        names, values = inner or (Any, Any)
        return isinstance(value, dict) and all(
            _has_type(k, names) and _has_type(v, values) for k, v in value.items()
        )
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    is_checked = kind in TYPE_NAMES or _is_enum(kind) or dataclasses.is_dataclass(kind)
    return isinstance(value, kind) if is_checked else True


def imported_class(key: str, path: str, base: type[Base]) -> type[Base]:
    """The subclass of `base` that config key `key` names; refuses a path that cannot be imported or is none. (Hydra's `get_class` logs
    to stdout before it raises.)"""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # an import runs user code, which may raise anything
        why = f"cannot be imported ({error})"
        raise ConfigError(key, path, why, "the path of a class") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        legal = f"a subclass of {base.__module__.partition('.')[0]}'s {base.__name__}"
        raise ConfigError(key, path, f"not a {base.__name__}", legal)
    return found


def instantiate(spec: dict[str, Any]) -> Any:
    """Call what a config names: the one door to Hydra's `instantiate`, whose safety argument changes in 1.4."""
    import hydra.utils

    return hydra.utils.instantiate(spec, _convert_="all")


@dataclass(frozen=True)
class Within:
    """Numbers from `least` to `most`; `open_below` and `open_above` leave the bound itself out, `or_zero` adds 0."""

    least: float = -math.inf
    most: float = math.inf
    open_below: bool = False
    open_above: bool = False
    or_zero: bool = False

    def __contains__(self, number: float) -> bool:
        if self.or_zero and number == 0:
            return True
        above = number > self.least if self.open_below else number >= self.least
        below = number < self.most if self.open_above else number <= self.most
        return (
            -math.inf < number < math.inf and above and below
        )  # (isfinite overflows for whole numbers above 1e308)

    def __str__(self) -> str:
        if self.or_zero:
            return f"0, or {dataclasses.replace(self, or_zero=False)}"
        least, most = number_text(self.least), f"{'below ' * self.open_above}{number_text(self.most)}"
        if self.most in (MAX_NUMBER, math.inf):
            return f"a number above {least}" if self.open_below else f"{least} or more"
        return f"a number {'above' if self.open_below else 'from'} {least} to {most}"


def AtLeast(least: int, most: int = MAX_NUMBER) -> Within:
    return Within(least, most)


@dataclass(frozen=True)
class OfType:
    """The type of a field that is `Any` to OmegaConf, which takes no union of lists."""

    hint: Any


POSITIVE = Within(0, open_below=True)
FRACTION = Within(0, 1)


def check_bounds(config: Any, prefix: str = "") -> None:
    """Refuse the first value that is not what its field declares, or that nothing could work with. Composing a config converts
    values; set in Python, text equals the member of an enum and yet is none, so that `is` would not find it.
    """
    for name, (hint, bound) in declared(type(config)).items():
        value, key = getattr(config, name), f"{prefix}{name}"
        if dataclasses.is_dataclass(value):
            check_bounds(value, f"{key}.")
            continue
        if not _has_type(value, hint):
            raise ConfigError(key, value, "of the wrong type", describe_type(hint))
        if value == "None" and hint == (str | None):
            raise ConfigError(key, value, "Hydra and YAML take it for a name", "null", {key: "null"})
        if bound:
            _check_bound(key, value, bound)
        if not isinstance(value, dict):  # a model, which its class reads
            check_usable(key, value)


def _check_bound(key: str, value: Any, bound: Within) -> None:
    for number in value if isinstance(value, list) else [value]:
        if number is None or number in bound:
            continue
        if not -math.inf < number < math.inf:
            why = "not a finite number"
        elif number < bound.least:
            why = "too small"
        else:
            why = f"above {number_text(MAX_NUMBER)}" if number > bound.most >= MAX_NUMBER else "out of bounds"
        raise ConfigError(key, value, why, str(bound))


@cache
def declared(schema: type) -> dict[str, tuple[Any, Within | None]]:
    """The type of each field of a schema, and its bounds."""
    found = {}
    for name, hint in get_type_hints(schema, include_extras=True).items():
        kind, *more = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        bound = next((each for each in more if isinstance(each, Within)), None)
        found[name] = next((each.hint for each in more if isinstance(each, OfType)), kind), bound
    return found
