"""`program.py`, an entrypoint without a training, as a user starts it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support.commands import Done

PROGRAM = Path(__file__).with_name("program.py")
Command = Callable[..., Done]
