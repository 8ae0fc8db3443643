"""The command that started this process, and how to type it again with a mistake mended."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tpresearch.config.errors import ConfigError, shown
from tpresearch.config.world import World


class WrongCommand(ConfigError):
    """A config that is refused for how it was started; `command` is what to type instead."""

    def __init__(self, field: str, value: object, why: str, legal: str, command: str) -> None:
        super().__init__(field, value, why, legal)
        self.command = command


def command_to_try(error: ConfigError, world: World) -> str:
    """What to type: this process's own command line with `error.fix` and `error.nproc` applied."""
    if isinstance(error, WrongCommand):
        return error.command
    return shlex.join([*starter(world, error.nproc), *program_words(), *mended(sys.argv[1:], error.fix)])


def python_command(arguments: Sequence[str]) -> str:
    """This program started without torchrun, with other arguments."""
    return shlex.join(["python", *program_words(), *arguments])


def starter(world: World, nproc: int | None = None) -> list[str]:
    """`python`, or `torchrun` with as many local ranks as there are now, or should be."""
    if not world.elastic and (nproc or 1) == 1:
        return ["python"]
    hosts = [f"--nnodes={world.hosts}"] if world.hosts > 1 else []
    return ["torchrun", *hosts, f"--nproc-per-node={nproc or world.local_size}"]


def program_words() -> list[str]:
    """The program as it is named on a command line: `train.py`, or `-m tpresearch.verify`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is not None:
        return ["-m", spec.name.removesuffix(".__main__")]
    script = Path(sys.argv[0])
    return [os.path.relpath(script) if script.is_relative_to(Path.cwd()) else str(script)]


def mended(arguments: Sequence[str], fix: Mapping[str, object]) -> list[str]:
    """The arguments with each override of `fix` in place of the one that sets the same key, or at the end.

    A fix of None drops the override. A key is the same with or without Hydra's `+`, `++` or `~` before it.
    """
    left = dict(fix)
    kept = []
    for argument in arguments:
        key = override_key(argument)
        if key not in fix:
            kept.append(argument)
        elif (value := left.pop(key, None)) is not None:
            kept.append(f"{key}={shown(value)}")
    return kept + [f"{key}={shown(value)}" for key, value in left.items() if value is not None]


def override_key(argument: str) -> str:
    """`train.steps` of `train.steps=3`, `+train.steps=3` and `~train.steps`."""
    return argument.partition("=")[0].lstrip("+~")


def override(key: str, value: object) -> str:
    """`key=value`, quoted as far as Hydra's grammar asks; a list is one of strings."""
    text = f"[{','.join(map(_quoted, value))}]" if isinstance(value, list) else _quoted(value)
    return f"{key}={text}"


def _quoted(value: object) -> str:
    text = str(value)
    if re.fullmatch(r"[\w./-]+", text):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
