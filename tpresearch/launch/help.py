"""`--help` of a command that composes a config: its groups and their options, then each key and its meaning from the schema."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Iterator
from enum import StrEnum
from functools import cache
from types import ModuleType
from typing import Any

from omegaconf import OmegaConf

from tpresearch.config.errors import format_value
from tpresearch.config.schema import ComposedConfig
from tpresearch.launch.command import program_words
from tpresearch.launch.composition import Composition

WIDTH, COLUMN = 140, 44


def help_text(composition: Composition, main: Callable[..., None]) -> str:
    """About a page, headed by the first line of the module of `main`."""
    values, groups = composition.values_without(""), composition.used_groups()
    program = " ".join(program_words())
    lines = [
        (inspect.getdoc(inspect.getmodule(main)) or "").partition("\n")[0],
        "",
        f"python {program} [GROUP=OPTION ...] [KEY=VALUE ...]      -m: a sweep over a,b,c   --cfg job: print the composed config",
        "",
        "GROUPS: each option is a file of conf/",
        *(_line(f"  {group}", ", ".join(sorted(options))) for group, options in groups.items()),
        "",
        "KEYS and their defaults",
        *(_line(f"  {key}={_short(values.get(key))}", meaning) for key, meaning in meanings().items()),
        _line("  model.*", "settings of its class, and model.plans.<tp|sp>.<rule>.{match,style,src,dst}"),
        _line("  hydra.run.dir, hydra.sweep.dir", "folder of a run, of a sweep; --hydra-help has the rest"),
    ]
    return "\n".join(lines)


def help_of_options(options: type) -> str:
    """The help of a command that composes no config, whose options are a dataclass in its module."""
    purpose = inspect.getdoc(inspect.getmodule(options))
    defaults: Any = OmegaConf.to_container(OmegaConf.structured(options), enum_to_str=True)
    shown = {key: "" if value in (None, "???") else _short(value) for key, value in defaults.items()}
    lines = [_line(f"  {key}={shown[key]}", meaning) for key, meaning in _meanings(options, "")]
    return "\n".join([str(purpose), "", *lines])


@cache
def meanings() -> dict[str, str]:
    """Each key of the schema and the first sentence of the text below it."""
    return dict(_meanings(ComposedConfig, ""))


def _meanings(kind: type, prefix: str) -> Iterator[tuple[str, str]]:
    hints = typing.get_type_hints(kind)
    module = inspect.getmodule(kind)
    assert module
    said = _texts(module)
    for field in dataclasses.fields(kind):
        hint, key = hints[field.name], f"{prefix}{field.name}"
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            yield from _meanings(hint, f"{key}.")
        elif field.name not in ("model", "cluster"):  # open: a file says what is in it
            text = said.get(f"{kind.__name__}.{field.name}")
            if text is None and isinstance(hint, type) and issubclass(hint, StrEnum):
                text = f"one of {', '.join(hint)}"
            yield key, " ".join((text or said[kind.__name__]).split()).partition(". ")[0].rstrip(".")


@cache
def _texts(module: ModuleType) -> dict[str, str]:
    """`Class.field` and the string that stands below it, which Python itself does not keep; `Class` and its own."""
    found = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ClassDef):
            found[node.name] = ast.get_docstring(node) or ""
            for field, text in zip(node.body, node.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                    found[f"{node.name}.{ast.unparse(field.target)}"] = ast.literal_eval(text.value)
    return found


def _short(value: object) -> str:
    """As it would be typed; a variable of the environment by its name."""
    text = f"[{','.join(map(str, value))}]" if isinstance(value, list) else format_value(value)
    text = re.sub(r"\$\{(?:words_)?from_env:(\w+).*\}", r"$\1", text)
    return text if len(text) < 24 else f"{text[:20]}..."


def _line(left: str, right: str) -> str:
    head, *more = textwrap.wrap(right, WIDTH - COLUMN) or [""]
    start = f"{left:<{COLUMN - 1}} {head}".rstrip()
    return "\n".join([start, *(" " * COLUMN + line for line in more)])
