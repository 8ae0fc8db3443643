"""The requested composition, its result and the alternatives: keys, values and groups for error messages."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from tpresearch.config.compose import resolve_paths, to_config
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import ComposedConfig, Config
from tpresearch.config.values import declared
from tpresearch.launch.command import is_within, override_key, quote, values_by_key
from tpresearch.launch.search_path import FILE, refuse_search_path, refuse_unread_files

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OverflowError)
"""What composing raises for a config file or an override that is wrong."""
VERSION_BASE = "1.3"
"""The version of Hydra whose defaults hold."""


def conf_dir() -> Path:
    """The folder of config files: in the package where it is installed, beside it in the repository."""
    installed = Path(__file__).parents[1] / "conf"
    return installed if installed.is_dir() else installed.parents[1] / "conf"


def initialize_conf() -> initialize_config_dir:
    """A context in which Hydra composes the files of conf/."""
    return initialize_config_dir(str(conf_dir()), version_base=VERSION_BASE)


@contextmanager
def _composing_others() -> Iterator[None]:
    """As `initialize_conf`, for other compositions than the requested one: Hydra's warnings of these are not the user's."""
    with initialize_conf(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_option(group: str, name: str) -> dict[str, Any]:
    """The content of an option of a config group, with that of the options in its defaults; refuses one that cannot be composed."""
    path = conf_dir() / group / f"{name}.yaml"
    try:
        # As Hydra reads it: PyYAML takes 3e3 for text.
        found: Any = OmegaConf.to_container(OmegaConf.load(path))
        if not isinstance(found, dict) or "defaults" in found:
            with initialize_conf():
                found = OmegaConf.to_container(compose(overrides=[f"+{group}={name}"])[group], resolve=True)
    except (*COMPOSITION_ERRORS, KeyError, TypeError, OSError) as error:
        why = f"{path} cannot be composed: {error}"
        raise ConfigError(group, name, why, "a file that can be") from error
    assert isinstance(found, dict)
    return {str(key): value for key, value in found.items()}


def files_of_option(group: str, name: str, folders: Sequence[Path]) -> list[tuple[str, dict[str, Any]]]:
    """The files from which an option is merged, each over those before it: the options in its defaults, and its own. None
    that is not found.

    Args:
        folders: of config files, the first of which that has an option counts.

    Returns: names, such as "cluster/h100_dgx.yaml", and contents, with interpolations as they are written.
    """
    path = next((p for folder in folders if (p := folder / group / f"{name}.yaml").is_file()), None)
    if path is None:
        return []
    content: Any = OmegaConf.to_container(OmegaConf.load(path))
    defaults = content.pop("defaults", [])
    own, found = (f"{group}/{name}.yaml", content), []
    for entry in defaults if "_self_" in defaults else [*defaults, "_self_"]:
        if entry == "_self_":
            found.append(own)
        elif isinstance(entry, str):
            base = Path(f"/{group}", name).parent / entry.partition("@")[0]
            found += files_of_option(group, str(base).removeprefix(f"/{group}/"), folders)
    return found


def chosen_files(group: str) -> list[tuple[str, dict[str, Any]]]:
    """`files_of_option` of the option that this process's config has; none where it has none."""
    runtime = HydraConfig.get().runtime
    chosen = runtime.choices.get(group)
    folders = [Path(source.path) for source in runtime.config_sources if source.schema == "file"]
    return files_of_option(group, chosen, folders) if chosen else []


def chosen_options() -> dict[str, str | None]:
    """The option of each config group that this process's config has; none of one that was loaded in Python."""
    if not HydraConfig.initialized():
        return {}
    return {str(group): option for group, option in HydraConfig.get().runtime.choices.items()}


@dataclass(frozen=True)
class Composition:
    config_name: str
    overrides: list[str]
    extra_dir: str | None = None
    """A further folder of config files (`--config-dir`)."""

    @classmethod
    def of(cls, arguments: Namespace, config_name: str) -> Composition:
        """The composition that Hydra's command line requests."""
        return cls(arguments.config_name or config_name, arguments.overrides, arguments.config_dir)

    @property
    def typed(self) -> dict[str, str]:
        """What its overrides set, by key; the last one of a key counts."""
        return values_by_key(self.overrides)

    def refuse_unusable(self) -> None:
        """Refuse what Hydra takes, and the framework cannot use: its own `???` is a traceback where it is first read, which for its
        own settings is late; a search path without its folder is a warning; text that it takes for a number is written as it writes
        that; a config group that is deleted leaves the schema's
        defaults, as if one had been chosen; and one that is added has no effect where the program does not compose it.
        """
        if key := next((override_key(typed) for typed in self.overrides if typed.endswith("=???")), None):
            raise ConfigError(key, "???", "it must be set", f"{key}=VALUE", fix={key: "VALUE"})
        if typed := self.typed.get("hydra.searchpath"):
            refuse_search_path(typed)
        for key, typed in self.typed.items():
            if key in text_keys():
                _refuse_changed_text(key, typed)
        deleted = [override_key(typed) for typed in self.overrides if typed.startswith("~")]
        groups = self.groups() if deleted else {}
        if group := next((key for key in deleted if key in groups), None):
            fix, legal = {group: "none" if "none" in groups[group] else None}, ", ".join(groups[group])
            raise ConfigError(group, "~", "a config group cannot be deleted", f"one of {legal}", fix=fix)
        added = [override_key(typed) for typed in self.overrides if typed.startswith("+")]
        for group in (key for key in added if key.isidentifier() and (conf_dir() / key).is_dir()):
            if error := self.unused_group(group):  # with the + Hydra composes it, and nothing reads it
                raise error

    def unused_group(self, group: str) -> ConfigError | None:
        """The refusal of a group that this program does not compose, though others do: a simulated step has no checkpoints."""
        if group not in self.groups():
            return None
        others = [typed for typed in self.overrides if override_key(typed) != group]
        used = dataclasses.replace(self, overrides=others).used_groups()
        if group in used:
            return None
        why = f"{self.config_name} does not use this config group"
        return ConfigError(group, self.typed.get(group), why, f"it takes {', '.join(sorted(used))}")

    def typed_key(self, key: str) -> str:
        """The key of the override that has this one as its beginning: `trian.steps` for `trian`."""
        return next((typed for typed in self.typed if is_within(typed, key)), key)

    def values_without(self, key: str) -> dict[str, Any]:
        """All keys and their values, as they are written, without the override of `key` (or without any override, if that fails)."""
        others = [typed for typed in self.overrides if override_key(typed) != key]
        with _composing_others():
            try:
                composed = compose(self.config_name, self._with_search_path(others), return_hydra_config=True)
            except COMPOSITION_ERRORS:
                typed = [] if key == "hydra.searchpath" else self._with_search_path([])
                composed = compose(self.config_name, typed, return_hydra_config=True)
        as_written: Any = OmegaConf.to_container(composed, resolve=False)
        values, hydra = every_key(as_written), key.startswith("hydra.")
        return {name: value for name, value in values.items() if name.startswith("hydra.") == hydra}

    def groups(self) -> dict[str, list[str]]:
        """Each config group and its options."""
        with _composing_others():
            loader = GlobalHydra.instance().config_loader()
            typed = self._with_search_path([])
            names = [name for name in loader.list_groups("") if name != "hydra"]
            return {name: loader.get_group_options(name, overrides=typed) for name in names}

    def used_groups(self) -> dict[str, list[str]]:
        """Each config group that this program composes, and its options."""
        settings = self.values_without(choices := "hydra.runtime.choices")
        return {name: options for name, options in self.groups().items() if f"{choices}.{name}" in settings}

    def _with_search_path(self, overrides: list[str]) -> list[str]:
        """These overrides, with the search path that was typed."""
        typed = [word for word in self.overrides if override_key(word) == "hydra.searchpath"][-1:]
        if self.extra_dir and not typed:
            typed = [f"hydra.searchpath=[{FILE}{Path(self.extra_dir).resolve()}]"]
        return [*typed, *(word for word in overrides if override_key(word) != "hydra.searchpath")]


def _refuse_changed_text(key: str, typed: str) -> None:
    """Refuse `logger.name=1e5`, which would become 100000.0, and such an item of a list or of a sweep."""
    with suppress(HydraException):  # which is said where it is composed
        value = OverridesParser.create().parse_override(f"{key}={typed}").value()
        items = value.list if isinstance(value, ChoiceSweep) else [value]
        words = re.split(r"[\s,\[\]]+", typed)
        for item in (each for one in items for each in (one if isinstance(one, list) else [one])):
            if isinstance(item, bool | int | float) and str(item) not in words:
                why = f"Hydra would make the text {item} of it"
                fix = {key: quote(typed) if item is value else "VALUE"}
                raise ConfigError(key, typed, why, "text in quotes, within those of the shell", fix=fix)


@cache
def text_keys() -> frozenset[str]:
    """Keys of texts, and of lists of them."""

    def of(schema: type, prefix: str = "") -> Iterator[str]:
        for name, (hint, _) in declared(schema).items():
            if dataclasses.is_dataclass(hint):
                yield from of(hint, f"{prefix}{name}.")
            elif hint in (str, str | None, list[str]):
                yield f"{prefix}{name}"

    return frozenset((*of(ComposedConfig), "hydra.run.dir", "hydra.sweep.dir", "hydra.job.name"))


def typed_config(config: DictConfig) -> Config:
    """The typed config of what Hydra composed, with or without Hydra's own settings in it; raises what `to_config` does."""
    composed = copy.deepcopy(config)
    with read_write(composed), open_dict(composed):
        hydra = composed.pop("hydra", None)
    _refuse_unknown_fields(composed)
    cfg = to_config(composed)
    if hydra is not None:
        _check_plan_name(cfg, hydra.runtime.choices.get("parallel"))
        refuse_unread_files(hydra.runtime)
        if hydra.job.chdir:
            resolve_paths(cfg)
    return cfg


def _check_plan_name(cfg: Config, chosen: str | None) -> None:
    """A plan's name must be that of its file, since records, tables and messages identify runs by it."""
    if chosen and cfg.parallel.name != Path(chosen).name:
        why = f"parallel={chosen} was chosen, and the record would name another plan"
        legal = "parallel=NAME to choose; a plan's file has its name"
        raise ConfigError("parallel.name", cfg.parallel.name, why, legal)


def _refuse_unknown_fields(composed: DictConfig) -> None:
    """OmegaConf lets `+train.stepz=3` into a structured config, and nothing would read it: a ConfigKeyError, as without the `+`."""
    for prefix, node in branches(composed):
        schema = OmegaConf.get_type(node)
        if not dataclasses.is_dataclass(schema):
            continue
        for key in sorted(set(node) - {field.name for field in dataclasses.fields(schema)}):
            error = ConfigKeyError(f"Key '{key}' not in '{schema}'")
            error.full_key = f"{prefix}{key}"
            raise error


def branches(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """A config and each one inside it, with what comes before its keys: "", "train.", "parallel.fsdp."."""
    yield prefix, config
    for key in config:
        is_there = not OmegaConf.is_interpolation(config, key) and not OmegaConf.is_missing(config, key)
        if is_there and isinstance(node := config[key], DictConfig):
            yield from branches(node, f"{prefix}{key!s}.")


def every_key(values: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Each dotted key of nested dicts with its value; for a branch, that is a dict."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found[f"{prefix}{key}"] = value
        if isinstance(value, dict):
            found |= every_key(value, f"{prefix}{key}.")
    return found
