"""Errors for refused configs: one sentence that says what is wrong and what would be legal."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tpresearch.config import choices

WRITABLE = "a folder that this user can write, with room on its disk"

TYPES = {
    "could not be converted to Integer": "a whole number",
    "could not be converted to Float": "a number",
    "is not a valid bool": "true or false",
    "' to string": "text",
    "is not a ListConfig": "a list",
}
"""Parts of OmegaConf's messages, and the type that was expected."""
Fix = Mapping[str, object] | None


class ConfigError(Exception):
    """An error that the user can fix, raised before anything expensive. Of a function that raises it, docstrings say that it refuses.

    The entrypoint prints it once per job as
    ``error: <field>=<value>: <why>; <what is legal>; try: <command>``, and exits with 2.

    Attributes:
        field: the config key at fault, as it is typed on the command line.
        fix: overrides that fix it (key -> value); None as a value drops that override. By default the field's own
            is dropped.
        nproc: the number of local ranks to start instead, if that fixes it.
    """

    def __init__(
        self, field: str, value: object, why: str, legal: str, fix: Fix = None, nproc: int | None = None
    ) -> None:
        self.field, self.value, self.why, self.legal = field, value, why, legal
        self.fix: dict[str, object] = {field: None} if fix is None else dict(fix)
        self.nproc = nproc
        sentence = f"{field}={format_value(value)}: {why}; {legal}"
        super().__init__(" ".join(sentence.split()))  # always one line

    def __reduce__(self) -> tuple[Any, ...]:
        """From process to process with its attributes; an exception's own way calls `__init__` with the sentence alone."""
        return type(self).__new__, (type(self), *self.args), vars(self)


class WrongModel(ConfigError):
    """A model's code is refused, by the name of the model or of its part at fault; no other command is an answer."""

    def __init__(self, name: str, why: str, legal: str) -> None:
        super().__init__("model", name, why, legal, fix={})


class RunFailed(Exception):
    """A run failed for a reason that its report states, without a bug, so no traceback is shown. Raised on every rank."""


class JobFailed(Exception):
    """A job of a sweep has failed; the sweep's table says why."""


def format_value(value: object) -> str:
    """A value as it would be typed on the command line, on one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return " ".join(str(value).split())


def reason_for_value(message: str) -> tuple[str, str]:
    """Why OmegaConf refuses a value, by its message, and what it would take."""
    if words := re.search(r"expected one of \[(.*)\]", message):
        return "no such choice", f"one of {words[1]}"
    if enum := re.search(r"not a valid input for <enum '(\w+)'>", message):
        members = getattr(choices, enum[1], ("RUN", "MULTIRUN"))  # of hydra.mode
        return "no such choice", f"one of {', '.join(members)}"
    if "is not Optional" in message:
        return "it cannot be null", "a value"
    if legal := next((legal for part, legal in TYPES.items() if part in message), None):
        return "of the wrong type", legal
    return message, "a value of its type in the schema"


@contextmanager
def refuse_unwritable(field: str, folder: object, fix: Fix = None) -> Iterator[None]:
    """Refuse a folder in which what is done meanwhile cannot be written, for an OSError."""
    try:
        yield
    except OSError as error:
        why = f"cannot be written: {error.strerror or error}"
        raise ConfigError(field, folder, why, WRITABLE, fix=fix) from None


MAX_LINE = 1000


def one_line(error: BaseException) -> str:
    """An exception's message, on one line; of one without a message, the name of its class."""
    return " ".join(str(error).split()) or type(error).__name__


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, no longer than one can read; of one without a message, the name of its class."""
    lines = (line.strip() for line in str(error).splitlines())
    return readable(next(filter(None, lines), type(error).__name__))


def readable(line: str) -> str:
    """A line, cut where it is longer than a table or a report could show."""
    return line if len(line) <= MAX_LINE else f"{line[:MAX_LINE].rstrip()}..."


NO_PLACE = "its forward"


def place_of(error: BaseException) -> str:
    """Where a model's own code ended, as `mine/net.py, line 3`: the last line that is neither a library's nor this package's other code."""
    package = Path(__file__).parents[1]
    lines = (
        f"{frame.filename}, line {frame.lineno}"
        for frame in reversed(traceback.extract_tb(error.__traceback__))
        if "site-packages" not in (path := Path(frame.filename)).parts
        and (not path.is_relative_to(package) or path.is_relative_to(package / "models"))
    )
    return next(lines, NO_PLACE)
