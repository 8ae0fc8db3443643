"""What the tests' processes and the server that ranks are forked from have ready: imports, and config files parsed once.

Of a rank's import of a test module pytest alone takes a tenth of a second; of composing a config a fifth is YAML.
"""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import pytest  # noqa: F401
import yaml
from omegaconf import OmegaConf

from support import checkpointed, commands, composed, counted_steps, nets, traces  # noqa: F401

_load = OmegaConf.load


@cache
def _parsed(text: str) -> Any:
    return OmegaConf.to_container(_load(io.StringIO(text)))


def load(file: Any) -> Any:
    """`OmegaConf.load`, which is a function of the text; of what it cannot parse it says itself what is wrong."""
    if not isinstance(file, io.TextIOBase):
        return _load(file)
    try:
        return OmegaConf.create(_parsed(file.read()))
    except (OSError, yaml.YAMLError):
        file.seek(0)
        return _load(file)


OmegaConf.load = staticmethod(load)
