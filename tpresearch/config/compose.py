"""From the DictConfig that Hydra composes to the typed `Config`, and from there to plain data."""

from __future__ import annotations

import dataclasses
import glob
import os
from functools import cache
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from tpresearch.config.model import model_as_dict, model_config
from tpresearch.config.schema import ComposedConfig, Config, SlurmConfig, TorchrunConfig
from tpresearch.config.values import check_bounds

FOLDERS = ("data.cache_dir", "logger.dir")
"""Keys of folders that may have to be made."""
PATHS = ("data.path", "tokenizer.path", "init_from", "resume")
"""Keys of existing files; if nothing exists there, the value is not a path but a name, such as a dataset on the hub."""


@cache
def register_schema() -> None:
    """Make `schema`, the first line of a defaults list, mean `ComposedConfig`: unknown keys and wrong types fail."""
    ConfigStore.instance().store(name="schema", node=ComposedConfig)
    launchers = {"torchrun_schema": TorchrunConfig, "slurm_schema": SlurmConfig}
    for name, schema in launchers.items():
        ConfigStore.instance().store(name=name, node=schema, group="hydra/launcher")


def to_config(composed: DictConfig) -> Config:
    """A composed config as dataclasses, with interpolations resolved. Refuses values out of bounds, and a model or rule that does
    not have the shape of one.

    Raises:
        omegaconf.errors.OmegaConfBaseException: for a missing value or a wrong interpolation.
    """
    found = OmegaConf.to_object(composed)
    assert isinstance(found, ComposedConfig)
    check_bounds(found)
    values: dict[str, Any] = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    values["model"] = model_config(values["model"])
    return Config(**values)


def as_dict(cfg: Config) -> dict[str, Any]:
    """The resolved config as plain data, in the shape of the YAML files: what a run folder and W&B keep."""
    plain: dict[str, Any] = to_plain(dataclasses.asdict(cfg) | {"model": model_as_dict(cfg.model)})
    return plain


def to_plain(value: Any) -> Any:
    """The value with enums replaced by their names, in dicts and lists too."""
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value  # an enum becomes its name


def resolve_paths(cfg: Config) -> None:
    """Make relative paths absolute, in place."""
    for key in (*FOLDERS, *PATHS):
        branch, _, name = key.rpartition(".")
        owner = getattr(cfg, branch) if branch else cfg
        setattr(owner, name, _absolute(getattr(owner, name), always=key in FOLDERS))


def _absolute(value: Any, always: bool) -> Any:
    if isinstance(value, list):
        return [_absolute(item, always) for item in value]
    if not isinstance(value, str) or not value.strip():
        return value
    path = Path(os.path.expanduser(value))
    return str(path.absolute()) if always or path.exists() or glob.glob(str(path), recursive=True) else value
