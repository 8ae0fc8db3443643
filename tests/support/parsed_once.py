"""What Hydra finds out again for each config that it composes is kept in these processes: half of what that takes.

What is composed is the same: tests/commands/test_run_files.py holds it to a process without this.
"""

from __future__ import annotations

import copy
import io
import pickle
from functools import cache, lru_cache
from pathlib import Path
from typing import IO, Any

import yaml
from hydra._internal import defaults_list as hydra_defaults
from hydra._internal.config_repository import CachingConfigRepository, IConfigRepository
from hydra._internal.defaults_list import Overrides
from hydra.core.default_element import InputDefault
from omegaconf import DictConfig, ListConfig, OmegaConf, _utils, base, grammar_parser
from omegaconf.resolvers import oc

_load, _interpolation_map = OmegaConf.load, hydra_defaults._create_interpolation_map


@cache
def _parsed(text: str) -> bytes:
    """Of a config in nodes, a pickle is made anew in a tenth of the time that its plain data takes."""
    return pickle.dumps(_load(io.StringIO(text)))


def load(file_: IO[Any] | Path | str) -> DictConfig | ListConfig:
    """`OmegaConf.load`, which is a function of the text; of what it cannot parse it says itself what is wrong."""
    if not isinstance(file_, io.TextIOBase):
        return _load(file_)
    try:
        return pickle.loads(_parsed(file_.read()))
    except (OSError, yaml.YAMLError):
        file_.seek(0)
        return _load(file_)


def interpolation_map(
    overrides: Overrides, defaults_list: list[InputDefault], self_added: bool
) -> DictConfig:
    """The choices that an interpolation in a defaults list may name: Hydra lists them where there is none, too."""
    if any(default.is_interpolation() for default in defaults_list):
        return _interpolation_map(overrides, defaults_list, self_added)
    return DictConfig({})


def begin_cache(self: CachingConfigRepository, delegate: IConfigRepository) -> None:
    """Its sources may be replaced by others, and are not changed themselves: no copy of them is needed."""
    self.delegate = copy.copy(delegate)
    self.cache = {}


OmegaConf.load = staticmethod(load)
# A tree is a function of the text, and is only read; what cannot be parsed is raised anew each time.
_parse = lru_cache(10_000)(grammar_parser.parse)
for module in (grammar_parser, _utils, base, oc):
    module.parse = _parse
hydra_defaults._create_interpolation_map = interpolation_map
CachingConfigRepository.__init__ = begin_cache
