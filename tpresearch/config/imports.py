"""Classes that a config names by their import path."""

from __future__ import annotations

import importlib
from typing import Any, TypeVar

from tpresearch.config.errors import ConfigError

Base = TypeVar("Base")


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
