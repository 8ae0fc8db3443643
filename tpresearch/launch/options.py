"""`key=value` words for the commands that compose no config, typed by a dataclass of their own."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from tpresearch.config.errors import ConfigError
from tpresearch.config.world import World
from tpresearch.launch.refuse import refuse

Options = TypeVar("Options")
TEXT = ("str", "str | None", str, str | None)
"""Annotations of a field that holds text, as written or evaluated."""


def read_options(kind: type[Options], words: Sequence[str]) -> Options:
    """The dataclass `kind` with these words' values.

    Raises:
        ConfigError: for a key that it has not, a value of another type, and one that is left out and has no default.
    """
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in fields:
            nearest = difflib.get_close_matches(key, fields, 1)
            fix = {key: None, **({nearest[0]: value} if nearest and equals else {})}
            legal = " ".join(f"{name}=" for name in sorted(fields))
            raise ConfigError(key or "option", value, "is no option of this command", legal, fix=fix)
    options = OmegaConf.structured(kind)
    texts = {field.name for field in dataclasses.fields(kind) if field.type in TEXT}  # type: ignore[arg-type]
    for word in words:
        key, _, value = word.partition("=")
        try:
            typed = _as_text(key, value) if key in texts else OmegaConf.from_dotlist([word])
            options = OmegaConf.merge(options, typed)
        except (OmegaConfBaseException, YAMLError) as error:
            why = str(error).splitlines()[0]
            raise ConfigError(key, value, why, "a value of that type", fix={key: None}) from None
    for key in sorted(OmegaConf.missing_keys(options)):
        raise ConfigError(key, "", "is not given", "a value of your own", fix={key: f"<{key}>"})
    return cast(Options, OmegaConf.to_object(options))


def _as_text(key: str, value: str) -> dict[str, str | None]:
    """The value of a text as it was typed: `1e-3` stays so, and `${x}` refers to nothing."""
    return {key: None if value == "null" else re.sub(r"(\\*)\$\{", r"\1\1\\${", value)}


def command(main: Callable[[], None]) -> None:
    """Run a command whose ConfigErrors end in one line on stderr and exit code 2."""
    try:
        main()
    except ConfigError as error:
        refuse(error, World.from_environment())
