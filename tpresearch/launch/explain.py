"""Turns exceptions of Hydra and OmegaConf during composition into a `ConfigError`."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException, OverrideParseException
from hydra.utils import get_class
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    MissingMandatoryValue,
    OmegaConfBaseException,
    ValidationError,
)

from tpresearch.config.errors import ConfigError, format_value, reason_for_value
from tpresearch.config.model import RULE_KEYS
from tpresearch.config.near_names import close_names, closest_name, nearest
from tpresearch.config.values import MAX_NUMBER
from tpresearch.launch.command import Command, WrongCommand, override_key, quote
from tpresearch.launch.composition import COMPOSITION_ERRORS, Composition, conf_dir
from tpresearch.launch.hydra_app import NOT_ACCEPTED


@contextmanager
def explain_errors(
    composition: Composition, errors: tuple[type[Exception], ...] = COMPOSITION_ERRORS
) -> Iterator[None]:
    """Raise what Hydra and OmegaConf raise meanwhile as a ConfigError."""
    try:
        yield
    except errors as error:
        GlobalHydra.instance().clear()  # the sentence names keys that exist, for which it composes again
        raise explain(error, composition) from error


def explain(error: Exception, composition: Composition) -> ConfigError:
    chain = list(_causes(error))
    if (ours := next((e for e in chain if isinstance(e, ConfigError)), None)) is not None:
        return ours
    if isinstance(error, OverrideParseException):
        return _unreadable(error, composition)
    if isinstance(error, MissingConfigException):
        return _unknown_option(error, composition)
    if isinstance(error, yaml.MarkedYAMLError):
        return _broken_file(error, composition)
    message = str(error)
    if sweep := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '([^=]+)=(.*)'", message):
        return _sweep(sweep[1], sweep[2])
    if again := re.match(r"(\S+) appears more than once in the final defaults list", message):
        value = composition.typed.get(again[1])
        return ConfigError(again[1], value, "it is chosen already", "no + before it", fix={again[1]: value})
    if there := re.match(r"Could not append to config\. An item is already at '(.+?)'", message):
        value = composition.typed.get(there[1])
        return ConfigError(there[1], value, "there is such a key", "no + before it", fix={there[1]: value})
    not_there = re.match(r"Could not override '(.+?)'", message)
    if not_there and (unused := composition.unused_group(not_there[1])):
        return unused
    if message.startswith("Config group override must be a string"):
        return _invalid_option_name(composition)
    if message.endswith(NOT_ACCEPTED):
        is_circle = any(isinstance(cause, RecursionError) for cause in chain)
        return _unreadable_value(message.removesuffix(NOT_ACCEPTED), composition, is_circle)
    cause = next((e for e in chain if isinstance(e, OmegaConfBaseException) and e.full_key), None)
    if cause is None:
        return _error_without_key(message, composition)
    if file := re.match(r"In '(.+)': \w+ raised while composing config", message):
        return _wrong_in_file(file[1], cause, composition)
    return _wrong_value(cause, composition)


OWN_CLASSES = (
    "models and sharding styles have one (docs/plans.md); an optimizer of your own, and a loop around the step, are set "
    "in Python (docs/python.md)"
)


def _unknown_key(key: str, value: object, composition: Composition) -> ConfigError:
    known = {**composition.values_without(key), **dict.fromkeys(composition.groups())}
    with_plus = f"+ before it: +{key}=VALUE", {key: None, f"+{key}": value}
    if key in (added := _settings_not_in_file(known) if key.startswith("model.") else []):
        why = "not in the model's file, so that its default holds"
        return ConfigError(key, value, why, *with_plus)
    if re.fullmatch(r"model\.plans\.\w+\.\w+", key) and str(value).startswith("{"):
        return ConfigError(key, value, "the plan has no such rule yet", *with_plus)
    known |= dict.fromkeys(added)
    why = "no such key" if "." in key else "no such config group or key"
    branch = key.rpartition(".")[0]
    while branch and branch not in known:
        branch = branch.rpartition(".")[0]
    siblings = [name for name in known if name.rpartition(".")[0] == branch]
    if not siblings and branch.startswith("hydra.") and isinstance(known[branch], dict):
        return ConfigError(key, value, f"{branch} has no keys yet", *with_plus)
    if key.endswith("._target_"):
        return ConfigError(key, value, "no such key", OWN_CLASSES)
    if near := close_names(key, known):
        legal = f"nearest is {near[0]}" if len(near) == 1 else f"nearest are {', '.join(near)}"
        return ConfigError(key, value, why, legal, fix={key: None, near[0]: value})
    return ConfigError(key, value, why, f"there are {', '.join(sorted(siblings or [branch]))}")


def _unknown_in_mapping(key: str, typed: str, composition: Composition) -> ConfigError:
    """For a key within a mapping that was typed as the value of another: `model.plans.tp.out={style: rowwise, srk: replicate}`."""
    value, known = composition.typed[typed], composition.values_without(typed)
    added = _settings_not_in_file(known) if key.startswith("model.") else []
    if key in added:
        why = f"{key} is not in the model's file, so that its default holds"
        fix = {typed: None, f"+{typed}": value}
        return ConfigError(typed, value, why, f"+ before it: +{typed}=VALUE", fix)
    branch, _, name = key.rpartition(".")
    there = [each.rpartition(".")[2] for each in (*known, *added) if each.rpartition(".")[0] == branch]
    return ConfigError(typed, value, f"no such key: {name}", f"one of {', '.join(nearest(name, there))}")


def _settings_not_in_file(known: Mapping[str, object]) -> list[str]:
    """Keys of the model's sharding rules, and of the arguments of its class if that can be imported, which its file leaves at their
    defaults."""
    rules = [name.removesuffix(".match") for name in known if re.fullmatch(r"model\.plans\..*\.match", name)]
    keys = [f"{rule}.{key}" for rule in rules for key in RULE_KEYS]
    with suppress(Exception):  # which is said where the model is built
        arguments = inspect.signature(get_class(str(known["model._target_"]))).parameters
        keys += [f"model.{name}" for name in arguments]
    return [key for key in keys if key not in known]


def _unreadable(error: OverrideParseException, composition: Composition) -> ConfigError:
    key, equals, value = error.override.partition("=")
    if not equals:
        return ConfigError(key, "", "an override needs a value", f"{key}=VALUE")
    said = _first_line(error.message)
    names_parser = "(" in error.message or said.startswith("LexerNoViableAltException")
    why = "cannot be read" if names_parser else f"cannot be read ({said})"
    legal = f"'{key}=[a,b]' for a list, '{key}=\"text\"' for text with special characters"
    is_text = isinstance(composition.values_without(key).get(override_key(key)), str | None)
    return ConfigError(key, value, why, legal, fix={override_key(key): quote(value) if is_text else None})


def _unreadable_value(key: str, composition: Composition, is_circle: bool) -> ConfigError:
    if is_circle:
        why, legal = "the defaults of one of its files lead back to itself", "defaults of other names"
    elif key == "hydra.job.env_copy":
        why, legal = "not all of these variables are set", "a list of those that are"
    else:
        why, options = "Hydra does not accept this value", composition.groups().get(key)
        legal = f"one of {', '.join(options)}" if options else "a value of the type that `--cfg hydra` shows"
    return ConfigError(key, composition.typed.get(key), why, legal)


def _unknown_option(error: MissingConfigException, composition: Composition) -> ConfigError:
    group, _, option = (error.missing_cfg_file or composition.config_name).rpartition("/")
    if not group:
        there = ", ".join(sorted(path.stem for path in conf_dir().glob("*.yaml")))
        drop = dict.fromkeys(["--config-name", "-cn", option])
        return ConfigError("--config-name", option, "no such config", f"one of {there}", fix=drop)
    for key, path in composition.typed.items():
        is_path = path.startswith("/") or path.endswith(".yaml")
        if is_path and error.missing_cfg_file in (f"{key}/{path}", f"{key}/{path.removesuffix('.yaml')}"):
            name = Path(path).stem
            why = "a config group takes an option's name, not a path"
            legal = f"{key}={name} hydra.searchpath=[file://FOLDER] for FOLDER/{key}/{name}.yaml, or a file in conf/{key}"
            return ConfigError(key, path, why, legal, fix={key: None})
    options = [name for name in error.options or () if not name.endswith("_schema")]
    value = composition.typed.get(group)
    why = "no such option" if value in (None, option) else f"there is no {option}"
    if value is None:
        groups = composition.groups()
        files = [typed for typed in composition.overrides if override_key(typed) in groups]
        why += f", asked for by {' or '.join(files) or composition.config_name}"
    if not options:
        return ConfigError(group, value or option, why, f"conf/{group}/ has none yet")
    legal = f"one of {', '.join(nearest(option, options))}"
    if composition.extra_dir is None and "hydra.searchpath" not in composition.typed:
        legal += ", or a file of your own with hydra.searchpath=[file://FOLDER]"
    return ConfigError(group, value or option, why, legal, fix={group: closest_name(option, options)})


def _invalid_option_name(composition: Composition) -> ConfigError:
    """For `model=3`, `model=null` and `=3`: in their message Hydra names neither the group nor the value."""
    groups = composition.groups()
    for key, value in composition.typed.items():
        if key in groups and (value == "null" or not re.match("[A-Za-z_]", value)):
            legal = f"one of {', '.join(groups[key])}"
            return ConfigError(key, value, "a config group takes an option's name", legal)
    return ConfigError("", composition.typed.get("", ""), "an override needs a key", "key=value")


def _broken_file(error: yaml.MarkedYAMLError, composition: Composition) -> ConfigError:
    mark = error.problem_mark
    where = f"line {mark.line + 1}, column {mark.column + 1} of {mark.name}" if mark else "a config file"
    key, value = _chosen_file(mark.name if mark else "", composition)
    return ConfigError(key, value, f"not YAML at {where}: {error.problem}", "a YAML file")


def _chosen_file(path: str, composition: Composition) -> tuple[str, str]:
    """The override that chose a config file, or the name of the config where none did."""
    for key, value in composition.typed.items():
        if f"{key}/{value}" in path.replace(".yaml", ""):
            return key, value
    return "--config-name", composition.config_name


def _wrong_in_file(file: str, error: OmegaConfBaseException, composition: Composition) -> ConfigError:
    field, value = _chosen_file(file, composition)
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        best = closest_name(str(error.full_key), composition.values_without(field))
        why, legal = ", which does not exist", f"nearest is {best}" if best else "a key of `--cfg job`"
        legal = OWN_CLASSES if str(error.full_key).endswith("._target_") else legal
    else:
        reason, legal = reason_for_value(_first_line(str(error)))
        why = f": {reason}"
    return ConfigError(field, value, f"{file}.yaml sets {error.full_key}{why}", legal)


def _sweep(key: str, value: str) -> ConfigError:
    legal = f"-m before the overrides to run each, or '{key}=[{value}]' for a list"
    return WrongCommand(key, value, "several values are a sweep", legal, Command(("-m", *sys.argv[1:])))


def _wrong_value(error: OmegaConfBaseException, composition: Composition) -> ConfigError:
    """A key that is known, with a value that its type refuses or that does not resolve."""
    full_key = str(error.full_key)
    if isinstance(error, MissingMandatoryValue):
        return ConfigError(full_key, "???", "it must be set", f"{full_key}=VALUE", fix={full_key: "VALUE"})
    if isinstance(error, ConfigAttributeError | ConfigKeyError):
        mappings = (key for key, value in composition.typed.items() if value.startswith("{"))
        if within := next((key for key in mappings if full_key.startswith(f"{key}.")), None):
            return _unknown_in_mapping(full_key, within, composition)
        full_key = composition.typed_key(full_key)
        return _unknown_key(full_key, composition.typed.get(full_key), composition)
    key = full_key.partition("[")[0]  # a list is typed as a whole
    others = composition.values_without(key)
    default, message = others.get(key), _first_line(str(error))
    typed = composition.typed.get(key)
    if isinstance(error, InterpolationResolutionError) and not isinstance(error, ValidationError):
        written = default if typed is None else typed
        if missing := re.match(r"Interpolation key '(.*)' not found", message):
            best = closest_name(missing[1], others)
            legal = f"nearest is ${{{best}}}" if best else "a key that `--cfg job` shows"
            return ConfigError(key, written, f"{missing[1]} does not exist", legal)
        why = message.replace("raised while resolving interpolation", "while resolving it")
        return ConfigError(key, written, why, "an interpolation that resolves")
    if isinstance(default, dict):
        legal = f"its keys one by one: {', '.join(f'{key}.{name}' for name in default)}"
        return ConfigError(key, typed, "a group of keys, not a value", legal)
    if "does not support deletion" in message:
        return ConfigError(key, "~", "a key cannot be deleted", f"a value, such as {format_value(default)}")
    why, legal = reason_for_value(message)
    if legal == "a whole number" and (whole := _whole_number(error.value)) is not None:
        return ConfigError(key, typed, why, f"{legal} in digits, {whole}", fix={key: whole})
    if key != full_key:
        why, legal = f"{format_value(error.value)} is of the wrong type", "a list"
    if "${" in str(default):  # what would be looked up is no example
        default = None
    if default not in (None, "???") and not legal.startswith("one of"):
        legal += f", such as {format_value(default)}"
    return ConfigError(key, error.value if typed is None else typed, why, legal, fix={key: default})


def _whole_number(value: object) -> int | None:
    """The number that 1e9 or 1000.0 stands for."""
    with suppress(ValueError):
        number = float(str(value))
        return int(number) if number.is_integer() and abs(number) <= MAX_NUMBER else None
    return None


def _error_without_key(message: str, composition: Composition) -> ConfigError:
    """An error without a key: the override that its text mentions, or the config as a whole."""
    for typed in composition.overrides:
        key, equals, value = typed.lstrip("+~").partition("=")
        if key and key in message:
            legal = "a key or an option that `--info` shows"
            return ConfigError(key, value if equals else "~", _first_line(message), legal)
    return ConfigError("--config-name", composition.config_name, _first_line(message), "see `--info`")


def _first_line(message: str) -> str:
    return message.strip().partition("\n")[0].rstrip(".;")


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
