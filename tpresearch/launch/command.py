"""A command line: that which started this process, its overrides, and how to type them with a mistake corrected."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from tpresearch.agent import TORCHRUN_OPTIONS
from tpresearch.config.errors import ConfigError, format_value
from tpresearch.config.secrets import LEGAL, words_without_secrets
from tpresearch.config.world import World, WrongEnvironment


@dataclass(frozen=True)
class Command:
    arguments: tuple[str, ...] = ()
    ranks: int | None = None
    """Ranks per host under torchrun; None for `python`."""
    hosts: int = 1
    options: tuple[str, ...] = ()
    """torchrun's other options, if there are several hosts: how those meet."""
    unset: tuple[str, ...] = ()
    """Environment variables to unset."""
    program: tuple[str, ...] = ()
    """The program, if it is not this process's own."""

    @classmethod
    def from_argv(cls, world: World) -> Command:
        ranks = world.local_size if world.elastic else None
        options = shlex.split(os.environ.get(TORCHRUN_OPTIONS, "")) if world.hosts > 1 else []
        return cls(tuple(sys.argv[1:]), ranks, world.hosts, tuple(options))

    @property
    def world(self) -> World:
        """The world as its rank 0 sees it."""
        ranks = self.ranks or 1
        return World(0, ranks * self.hosts, 0, ranks, elastic=self.ranks is not None)

    def corrected(self, error: ConfigError) -> Command:
        """The command with the mistake corrected, as far as the error has a fix."""
        if isinstance(error, WrongCommand) and isinstance(error.command, Command):
            return error.command
        if isinstance(error, WrongEnvironment):
            return dataclasses.replace(self, unset=tuple(error.given))
        ranks = self.ranks if error.nproc is None else error.nproc
        if error.nproc == 1 and self.hosts == 1:
            ranks = None
        return dataclasses.replace(self, arguments=tuple(corrected(self.arguments, error.fix)), ranks=ranks)

    def typed(self, words: Iterable[str]) -> Command:
        return dataclasses.replace(self, arguments=tuple(words))

    def without(self, key: str) -> Command:
        """The command without the overrides of this key and of keys below it, and without those that delete its parent."""
        return self.typed(word for word in self.arguments if not _concerns(word, key))

    def __str__(self) -> str:
        unset = [word for name in self.unset for word in ("-u", name)]
        hosts = self.options or ([f"--nnodes={self.hosts}"] if self.hosts > 1 else [])
        starter = ["python"] if self.ranks is None else ["torchrun", *hosts, f"--nproc-per-node={self.ranks}"]
        program = self.program or program_words()
        return shlex.join([*(["env", *unset] if unset else []), *starter, *program, *self.arguments])


class WrongCommand(ConfigError):
    """A config that is refused for how it was started; `command` is the one to type instead."""

    def __init__(self, field: str, value: object, why: str, legal: str, command: Command | str) -> None:
        super().__init__(field, value, why, legal)
        self.command = command


def refuse_typed_secrets(world: World) -> None:
    """Refuse credentials on the command line, before anything could repeat them, with the rest of that to type."""
    rest, found = words_without_secrets(sys.argv[1:])
    for key, what in found.items():
        why = f"holds {what}, which would be written to the run's record"
        raise WrongCommand(key, "...", why, LEGAL, Command.from_argv(world).typed(rest))


CommandCheck = Callable[[Command], ConfigError | None]
"""Why a command would be refused; None if it would run."""


def _concerns(word: str, key: str) -> bool:
    of = override_key(word)
    return is_within(of, key) or (word.startswith("~") and is_within(key, of))


def python_command(arguments: Sequence[str]) -> str:
    """This program started without torchrun, with other arguments."""
    return str(Command(tuple(arguments)))


def program_words() -> list[str]:
    """The program as it is named on a command line: `train.py`, or `-m tpresearch.verify`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return ["-m", spec.name.removesuffix(".__main__")]
    script = Path(sys.argv[0])
    return [os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)]


def corrected(arguments: Sequence[str], fix: Mapping[str, object]) -> list[str]:
    """The arguments with each override of `fix` in place of the one that sets the same key, or after the last override.

    A fix of None drops the override. A key is the same with or without Hydra's `+`, `++` or `~` before it.
    """
    left = dict(fix)
    kept = []
    for argument in arguments:
        key = override_key(argument)
        if key not in fix:
            kept.append(argument)
        elif (value := left.pop(key, None)) is not None:
            kept.append(_typed(key, value))
    new = [_typed(key, value) for key, value in left.items() if value is not None]
    # After the other overrides, since flags have to follow all of them.
    behind = 1 + max((at for at, word in enumerate(kept) if is_override(word)), default=-1)
    return [*kept[:behind], *new, *kept[behind:]]


def _typed(key: str, value: object) -> str:
    """The override as Hydra reads it: a path may have a space in it."""
    return override(key, value) if isinstance(value, Path) else f"{key}={format_value(value)}"


def is_override(word: str) -> bool:
    """Whether a word of a command line sets a key or, with `~`, deletes one."""
    return not word.startswith("-") and ("=" in word or word.startswith("~"))


def override_key(argument: str) -> str:
    """`train.steps` of `train.steps=3`, `+train.steps=3` and `~train.steps`."""
    return argument.partition("=")[0].lstrip("+~")


def values_by_key(words: Iterable[str]) -> dict[str, str]:
    """What these overrides set, as it was typed: `{"train.steps": "3"}` of `+train.steps=3`; the last of a key counts."""
    return {override_key(word): word.partition("=")[2] for word in words}


def is_within(key: str, branch: str) -> bool:
    """Whether a dotted key is this branch or below it."""
    return f"{key}.".startswith(f"{branch}.")


def override(key: str, value: object) -> str:
    """`key=value`, quoted as far as Hydra's grammar requires; a list is one of strings."""
    text = f"[{','.join(map(quote, value))}]" if isinstance(value, list) else quote(value)
    return f"{key}={text}"


def quote(value: object) -> str:
    """Text as a value of an override, quoted as far as Hydra's grammar requires, which takes `1e5` for a number."""
    text = str(value)
    is_plain = re.fullmatch(r"[\w./-]+", text, re.ASCII) and not _is_read_otherwise(text)
    return text if is_plain else QuotedString(text, Quote.single).with_quotes()


def _is_read_otherwise(text: str) -> bool:
    with suppress(ValueError):
        float(text)
        return True
    return text.lower() in ("true", "false", "null")
