"""What happens between Hydra's composing and main: judge the config, then settle the folder."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.utils import get_method
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import ConfigKeyError

from tpresearch.config.compose import typed
from tpresearch.config.schema import Config
from tpresearch.config.world import World
from tpresearch.launch.composition import branches
from tpresearch.launch.run_dir import agree, sweep_folder


class Passing(BaseException):
    """Carries an exception out through Hydra, which swallows those of callbacks and has a line for main's."""

    def __init__(self, error: Exception, composing: bool) -> None:
        self.error, self.composing = error, composing


@contextmanager
def passing(composing: bool) -> Iterator[None]:
    """Let exceptions through Hydra; `composing` tells whether OmegaConf's are about the config, or a bug."""
    try:
        yield
    except Exception as error:
        raise Passing(error, composing) from None


class Start(Callback):
    """Hydra's callback before a run makes its folder, so that a refused config leaves nothing behind.

    `check` is the import path of a function of (Config, World) that raises ConfigError for what cannot run.
    """

    swept: ClassVar[Path | None] = None
    """The folder of this process's sweep, once there is one."""

    def __init__(self, check: str | None = None) -> None:
        self.check = check

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        world = World.from_environment()
        with passing(composing=True):
            cfg = typed_config(config)
        with passing(composing=False):
            if self.check:
                get_method(self.check)(cfg, world)
        with passing(composing=True), read_write(config.hydra.run):
            config.hydra.run.dir = str(agree(config, world))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        with passing(composing=True), read_write(config.hydra.sweep):
            Start.swept = sweep_folder(config)
            config.hydra.sweep.dir = str(Start.swept)


def typed_config(config: DictConfig) -> Config:
    """The typed config of what Hydra composed, its own settings included.

    Raises:
        ConfigError, omegaconf.errors.OmegaConfBaseException: for what is not a config.
    """
    HydraConfig.instance().set_config(config)  # for ${hydra:...}; Hydra does so only later
    composed = _without_hydra(config)
    _refuse_unknown_fields(composed)
    return typed(composed)


def _without_hydra(config: DictConfig) -> DictConfig:
    composed = copy.deepcopy(config)
    with read_write(composed), open_dict(composed):
        del composed["hydra"]
    return composed


def _refuse_unknown_fields(composed: DictConfig) -> None:
    """OmegaConf lets `+train.stepz=3` into a structured config, and nothing would read it.

    Raises:
        ConfigKeyError: as OmegaConf does without the `+`.
    """
    for prefix, node in branches(composed):
        schema = OmegaConf.get_type(node)
        if not dataclasses.is_dataclass(schema):
            continue
        for key in sorted(set(node) - {field.name for field in dataclasses.fields(schema)}):
            error = ConfigKeyError(f"Key '{key}' not in '{schema}'")
            error.full_key = f"{prefix}{key}"
            raise error
