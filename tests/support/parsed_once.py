"""Config files that do not change are parsed once in these processes: a fifth of what composing a config takes is YAML."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import yaml
from omegaconf import OmegaConf

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
