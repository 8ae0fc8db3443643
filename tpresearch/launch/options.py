"""`key=value` options of the commands that compose no config: each command has its own dataclass."""

from __future__ import annotations

import difflib
import glob
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tpresearch import interrupt
from tpresearch.config.errors import ConfigError, first_line, reason_for_value
from tpresearch.config.world import World
from tpresearch.launch.command import refuse_typed_secrets
from tpresearch.launch.help import help_of_options
from tpresearch.launch.home import check_home
from tpresearch.launch.logs import tolerate_print_errors
from tpresearch.launch.refuse import refuse

Options = TypeVar("Options")
INTERPOLATION = re.compile(r"(\\*)\$\{")


def read_options(kind: type[Options], words: Sequence[str]) -> Options:
    """An instance of the dataclass `kind` with these words' values.

    OmegaConf converts each value to its field's type. Text is taken as typed: `1e-3` and `[a` stay text, `${x}` refers
    to nothing; `null` is None. Refuses an unknown key, a value of the wrong type, and the lack of a required option.
    """
    options = OmegaConf.structured(kind)
    names = sorted(map(str, options))
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in names:
            near = difflib.get_close_matches(key, names, 1) if equals else []
            fix = {key: None, **dict.fromkeys(near, value)}
            legal = " ".join(f"{name}=" for name in names)
            raise ConfigError(key or "option", value, "unknown option", legal, fix=fix)
        try:
            options[key] = None if value == "null" else INTERPOLATION.sub(r"\1\1\\${", value)
        except OmegaConfBaseException as error:
            raise ConfigError(key, value, *reason_for_value(first_line(error))) from None
    for key in sorted(OmegaConf.missing_keys(options)):
        raise ConfigError(key, "", "required and not given", f"{key}=VALUE", fix={key: f"<{key}>"})
    return cast(Options, OmegaConf.to_object(options))


def words_and_options(kind: type[Options], words: Sequence[str]) -> tuple[list[str], Options]:
    """The words that name files, and the options, as by `read_options`.

    An option is `key=value` and not a path, which may hold `=` too, as the folders of some sweepers do.
    """
    names = set(map(str, OmegaConf.structured(kind)))

    def is_option(word: str) -> bool:
        key, equals, _ = word.partition("=")
        is_path = not key.isidentifier() or Path(word).exists() or glob.has_magic(word)
        return bool(equals) and (key in names or not is_path)

    return [word for word in words if not is_option(word)], read_options(kind, list(filter(is_option, words)))


def _error_of_options(kind: type | None, words: Sequence[str]) -> ConfigError | None:
    """Why a command with these words would be refused before it looks at what they name."""
    try:
        if kind is not None:
            words_and_options(kind, words)
    except ConfigError as error:
        return error
    return None


def command(main: Callable[[], None], options: type | None = None) -> None:
    """Run a command whose ConfigErrors end in one line on stderr and exit code 2.

    Args:
        options: its dataclass; `--help` prints what is written below each field, and the text of its module.
    """
    tolerate_print_errors()
    interrupt.restore_interrupt()
    try:
        refuse_typed_secrets(World())
        check_home(World())
        if options and {"-h", "--help"} & set(sys.argv[1:]):
            print(help_of_options(options))
        else:
            main()
    except KeyboardInterrupt:
        interrupt.print_stopped()
        sys.exit(interrupt.INTERRUPTED)
    except ConfigError as error:
        refuse(error, World(), lambda tried: _error_of_options(options, tried.arguments))
