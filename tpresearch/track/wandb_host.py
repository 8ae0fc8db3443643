"""Whether W&B can be used: valid settings, the wanted mode, an API key and a host that answers."""

from __future__ import annotations

import logging
import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

import yaml

from tpresearch.config.errors import ConfigError, format_value
from tpresearch.config.network import is_reachable
from tpresearch.config.schema import LoggerConfig, WandbMode
from tpresearch.config.world import WrongEnvironment
from tpresearch.launch.composition import every_key

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]

MAX_NAME_CHARS, MAX_TAG_CHARS = 128, 64
"""Characters of a name and of a tag, by W&B's own rules; a project or a run's id has none of RESERVED."""
RESERVED = set("/\\#?%:")
MAY_HAVE_RESERVED = ("logger.group", "logger.name", "logger.job_type")
KNOWN_VARIABLES = {
    *("WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP", "WANDB_NAME", "WANDB_JOB_TYPE"),
    *("WANDB_TAGS", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"),
}
"""Variables that are checked without the client."""

log = logging.getLogger(__name__)


def check_settings(logger: LoggerConfig, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse settings that W&B would refuse, online and offline, by the setting, or the variable that it comes from."""
    named = {key: getattr(logger, key) for key in ("project", "entity", "group", "name", "job_type")}
    found = {f"logger.{key}": value for key, value in named.items() if value is not None}
    found |= {"WANDB_RUN_ID": run_id} if (run_id := environment.get("WANDB_RUN_ID")) else {}
    for field, value in found.items():
        reserved = RESERVED & set("" if field in MAY_HAVE_RESERVED else value)
        if reserved or not value.strip() or value != value.strip() or len(value) > MAX_NAME_CHARS:
            legal = f"at most {MAX_NAME_CHARS} characters, and none of {' '.join(sorted(RESERVED))}"
            why = f"has {' '.join(sorted(reserved))} in it" if reserved else "not a valid W&B name"
            if field == "WANDB_RUN_ID":
                raise WrongEnvironment(field, value, why, [field], legal)
            fix = {"logger.project": LoggerConfig().project, "logger.entity": "null", "logger.name": "null"}
            raise ConfigError(field, value, why, legal, {field: fix[field]} if field in fix else None)
    for tag in logger.tags:
        if not 0 < len(tag) <= MAX_TAG_CHARS:
            why = f"W&B does not accept a tag of {len(tag)} characters"
            legal = f"tags of 1 to {MAX_TAG_CHARS}"
            raise ConfigError("logger.tags", tag, why, legal, fix={"logger.tags": "[]"})
    _check_variables({name: value for name, value in environment.items() if name.startswith("WANDB_")})


def _check_variables(given: Mapping[str, str]) -> None:
    """Refuse a variable that the client would refuse: it would log nothing, with only a warning."""
    if not {*given} - KNOWN_VARIABLES:
        return
    import wandb  # late: it takes a second

    for name, value in given.items():
        try:
            wandb.Settings().update_from_env_vars({name: value})
        except (ValueError, wandb.Error) as error:  # pydantic's, and its own
            said = error.errors()[0]["msg"] if hasattr(error, "errors") else str(error)
            shown = "..." if "KEY" in name else value
            raise WrongEnvironment(name, shown, "W&B does not accept it", [name], said) from None


def check_sweep(
    config: Mapping[str, Any],
    options: Mapping[str, str | None],
    typed: Mapping[str, str],
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Refuse a config that lacks what `wandb agent` has drawn for this run: W&B would record that, and something else would train.

    Args:
        config: as plain data. options: the option of each config group. typed: overrides by key, which need no check.
    """
    path = Path(environment.get("WANDB_SWEEP_PARAM_PATH") or "-")
    parameters = yaml.safe_load(path.read_bytes()) if path.is_file() else {}
    drawn = every_key({key: each["value"] for key, each in parameters.items() if isinstance(each, dict)})
    here = {**every_key(config), **options}
    for key in (key for key in drawn if key in here and key not in typed):
        wanted, found = drawn[key], here[key]
        if isinstance(wanted, dict) or isinstance(found, dict) or _is_same(wanted, found):
            continue
        why = f"the W&B sweep has drawn {format_value(wanted)}, which its command does not pass on"
        legal = "${args_no_hyphens} in the command of the sweep's file, or what was drawn"
        raise ConfigError(key, found, why, legal, {key: wanted})


def _is_same(drawn: object, found: object) -> bool:
    """Also of `1e-3`, which YAML 1.1 takes for text."""
    try:
        return str(drawn) == str(found) or float(str(drawn)) == float(str(found))
    except ValueError:
        return False


def choose_mode(wanted: WandbMode, settings: wandb.Settings) -> Mode:
    """The mode from the config, else from the environment (WANDB_MODE), as far as it can work; a warning says if it cannot."""
    if wanted is WandbMode.offline:
        return "offline"
    if wanted is WandbMode.auto and settings.mode in ("offline", "dryrun"):
        log.info("W&B: offline, as WANDB_MODE asks")
        return "offline"
    if wanted is WandbMode.auto and settings.mode == "disabled":
        log.info("W&B: off, as WANDB_MODE asks")
        return "disabled"
    if not has_key(settings):
        log.warning("W&B: offline, because there is no API key; set one with `wandb login` or WANDB_API_KEY")
        return "offline"
    if not is_reachable(settings.base_url):
        log.warning("W&B: offline, because %s does not answer", settings.base_url)
        return "offline"
    return "online"


def has_key(settings: wandb.Settings) -> bool:
    """Whether the client would find credentials: in its settings, the environment or the netrc file."""
    if settings.api_key or settings.identity_token_file:
        return True
    try:
        accounts = netrc.netrc(os.environ.get("NETRC") or Path(os.path.expanduser("~/.netrc")))
    except (OSError, netrc.NetrcParseError):
        return False
    return accounts.authenticators(urlsplit(settings.base_url).netloc) is not None
