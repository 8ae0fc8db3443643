"""Values that the schema leaves to YAML, held to a type: settings of a model's class, sharding rules, paths, and classes by their import path."""

from __future__ import annotations

import importlib
import math
import unicodedata
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin

from tpresearch.config.errors import ConfigError

GREATEST = 10**15
"""No count, length or size is greater: a mistyped one would overflow, or never end."""
LONGEST = 4096
"""Characters of a text, which is a name or a path."""
UNPRINTABLE = ("Cc", "Cs")
"""Unicode categories: control characters, and bytes that were no UTF-8."""

NAMES: dict[Any, str] = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    NoneType: "null",
    list: "a list",
    dict: "a dict",
}
Base = TypeVar("Base")


def check_value(key: str, value: object, hint: Any) -> None:
    """Refuse a value that is not of the type that `hint` describes, or that nothing could work with.

    Args:
        hint: a type hint made of plain types, lists, dicts by name, and unions; any other says nothing.

    Raises:
        ConfigError: naming `key`.
    """
    if not _fits(value, hint):
        raise ConfigError(key, value, "of the wrong type", described(hint))
    check_sane(key, value)


def check_sane(key: str, value: object) -> None:
    """Refuse numbers that are not finite or beyond use, and text that no file system and no record would take.

    Raises:
        ConfigError: naming `key`.
    """
    if isinstance(value, dict):
        for name, item in value.items():
            check_sane(f"{key}.{name}", name)
            check_sane(f"{key}.{name}", item)
    elif isinstance(value, list):
        for item in value:
            check_sane(key, item)
    elif isinstance(value, str):
        if len(value) > LONGEST:
            raise ConfigError(key, f"{value[:20]}...", f"{len(value)} characters", f"at most {LONGEST}")
        if any(unicodedata.category(char) in UNPRINTABLE for char in value):
            raise ConfigError(key, ascii(value), "it has control characters", "text on one line")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(key, value, "not a finite number", "a finite number")
    elif isinstance(value, int) and abs(value) > GREATEST:
        raise ConfigError(key, value, "out of bounds", f"a whole number up to {GREATEST:g}")


def described(hint: Any) -> str:
    """A type hint in words: "a list of text", "a whole number or null"."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return " or ".join(described(one) for one in inner)
    if kind is list and inner:
        return f"a list of {described(inner[0])}"
    if kind is dict and inner:
        return f"a dict, each of its values {described(inner[1])}"
    return NAMES.get(kind, "a value")


def _fits(value: object, hint: Any) -> bool:
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if kind in (Union, UnionType):
        return any(_fits(value, one) for one in inner)
    if kind is list:
        return isinstance(value, list) and all(_fits(item, one) for item in value for one in inner)
    if kind is dict:
        names, values = inner or (Any, Any)
        return isinstance(value, dict) and all(_fits(k, names) and _fits(v, values) for k, v in value.items())
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return kind not in NAMES or isinstance(value, kind)


def imported_class(key: str, path: str, base: type[Base]) -> type[Base]:
    """The subclass of `base` that config key `key` names. (Hydra's `get_class` logs to stdout before it raises.)

    Raises:
        ConfigError: for a path that cannot be imported, or is no such class.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except Exception as error:  # an import runs the user's own code, which may raise anything
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
