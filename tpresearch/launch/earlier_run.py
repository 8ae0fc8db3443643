"""`resume=RUN`: the command that started an earlier run, repeated in its folder."""

from __future__ import annotations

import glob
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from tpresearch.checkpoint.disk import STEP_FOLDER, step_folders
from tpresearch.checkpoint.resume import AUTO, NEVER, check_started, find_checkpoint, run_of
from tpresearch.config.compose import FOLDERS, PATHS
from tpresearch.config.errors import ConfigError, first_line
from tpresearch.launch.command import is_within, override, override_key, values_by_key
from tpresearch.launch.search_path import FILE

REPLACED_KEYS = {"parallel": ("parallel", "mesh")}
"""Overrides that a new one replaces: choosing a plan drops the earlier plan's settings and mesh sizes."""


def repeat_command_of_run(arguments: Namespace) -> Path | None:
    """If `resume` names a run, make this command line the one that started it, with the present overrides on top. Refuses a run that
    is not there, and another folder than the run's.

    Returns: the run's folder, or None if no run is named.
    """
    typed = values_by_key(arguments.overrides)
    named = _unquoted(typed.get("resume", AUTO)) or "null"
    if named in (AUTO, NEVER):
        return None
    if arguments.multirun or typed.get("hydra.mode") == "MULTIRUN":
        why = "the jobs of a sweep have folders of their own"
        legal = "init_from, for new runs from its weights"
        raise ConfigError("resume", named, why, legal, fix={"resume": None, "init_from": named})
    run, path = run_of(Path(named)), Path(named)
    # One that is gone may be of a job that torchrun has restarted since, which is known once ranks have agreed on the folder.
    is_gone = STEP_FOLDER.fullmatch(path.name) and not os.path.lexists(os.path.expanduser(path))
    check_started(find_checkpoint(run if is_gone else path, "resume"))
    asked = typed.get("hydra.run.dir")
    if asked is not None and Path(os.path.expanduser(_unquoted(asked))).resolve() != run:
        why = f"resume={named} continues in that run's own folder"
        legal = "no other folder; init_from starts a new run from its weights"
        raise ConfigError("hydra.run.dir", asked, why, legal)
    replaced = {branch for key in typed for branch in REPLACED_KEYS.get(key, (key,))}
    then = [w for w in overrides_of_run(run) if not any(is_within(override_key(w), key) for key in replaced)]
    arguments.overrides = [*then, *arguments.overrides, override("hydra.run.dir", run)]
    start = _last_start(run)
    arguments.config_name = arguments.config_name or start.config_name
    arguments.config_path = arguments.config_path or start.config_path
    arguments.config_dir = arguments.config_dir or start.config_dir
    return run


def _unquoted(value: str) -> str:
    """A value of an override as Hydra reads it, if that is text; otherwise as it was typed."""
    with suppress(HydraException):  # said where the config is composed
        read = OverridesParser.create().parse_override(f"key={value}").value()
        return read if isinstance(read, str) else value
    return value


class _Start(NamedTuple):
    """How a run was started, as Hydra recorded it."""

    overrides: list[str]
    hydra_overrides: list[str]
    folder: Path
    config_name: str
    config_path: str | None
    config_dir: str | None


def _last_start(run: Path) -> _Start:
    """The last start of a run; refuses one without a record that can be read."""
    try:
        files = (run / ".hydra" / name for name in ("overrides.yaml", "hydra.yaml"))
        typed, record = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)
        hydra = record["hydra"]
        sources = {source["provider"]: source["path"] for source in hydra["runtime"]["config_sources"]}
        of_hydra, folder = hydra["overrides"]["hydra"], Path(hydra["runtime"]["cwd"])
        flags = hydra["job"]["config_name"], _own_conf(sources["main"]), sources.get("command-line")
        return _Start([*typed], [*of_hydra], folder, *flags)
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError) as error:
        why = f"its overrides cannot be read: {getattr(error, 'strerror', None) or first_line(error)}"
        raise ConfigError("resume", run, why, "a run folder with its .hydra") from None


def _own_conf(folder: str) -> str | None:
    """The folder from which a run was composed, unless that is the conf of this package, here or wherever it was then."""
    beside = Path(folder).parent
    is_own = not any((package / "launch").is_dir() for package in (beside, beside / "tpresearch"))
    return folder if is_own and os.path.isdir(folder) else None


def overrides_of_run(run: Path) -> list[str]:
    """The overrides with which a run was last started, from Hydra's record; refuses a run without one."""
    start = _last_start(run)
    searches = (word for word in start.hydra_overrides if override_key(word) == "hydra.searchpath")
    searched = [_found_from(start.folder, word) for word in searches]
    typed = [word for word in start.overrides if override_key(word) != "resume"]
    if start.folder != Path.cwd():
        typed = [_seen_from(start.folder, w) if override_key(w) in (*PATHS, *FOLDERS) else w for w in typed]
    return [*searched, *typed]


def _seen_from(folder: Path, word: str) -> str:
    """An override of a path, or of several, with those that another folder has."""

    def seen(path: object) -> object:
        there = str(folder / os.path.expanduser(str(path)))
        return there if glob.glob(there, recursive=True) or os.path.exists(there) else path

    given = OverridesParser.create().parse_override(word).value()
    found = [seen(each) for each in given] if isinstance(given, list) else seen(given)
    return word if found == given else override(override_key(word), found)


def _found_from(folder: Path, searchpath: str) -> str:
    """A search path with its relative folders as seen from another folder, if one of them is not to be found from here."""
    given = OverridesParser.create().parse_override(searchpath).value()
    places = [str(each) for each in given] if isinstance(given, list) else []
    found = [
        FILE + str(folder / place) if each.startswith(FILE) and not place.is_dir() else each
        for each in places
        for place in [Path(each.removeprefix(FILE))]
    ]
    return searchpath if found == places else override("hydra.searchpath", found)


def repeat_or_start_again(arguments: Namespace) -> Path | None:
    """`repeat_command_of_run`; of a run without a checkpoint that can be read, the command that starts it again is proposed."""
    try:
        return repeat_command_of_run(arguments)
    except ConfigError as error:
        run = Path(str(error.value))
        with suppress(ConfigError, OSError):
            if error.field == "resume" and (_starts_over(error) or not step_folders(run)):
                kept = _not_typed_again(run, arguments.overrides)
                error.fix = {"resume": error.fix.get("resume"), **kept, "hydra.run.dir": run}
        raise


@contextmanager
def repeating_overrides(earlier: Path | None) -> Iterator[None]:
    """Make a proposed command that starts a new run, or this one over, instead of resuming it, repeat all overrides of that one."""
    try:
        yield
    except ConfigError as error:
        if earlier and ("init_from" in error.fix or _starts_over(error)):
            where = {"hydra.run.dir": earlier} if _starts_over(error) else {}
            error.fix = _not_typed_again(earlier, sys.argv[1:]) | error.fix | where
        raise


@contextmanager
def keeping_overrides(run: Path) -> Iterator[None]:
    """Put back what Hydra has recorded of a run's last start, which `resume` repeats, if this start is refused before it has saved a
    checkpoint."""
    before = {path: path.read_bytes() for path in (run / ".hydra").glob("*.yaml")}
    saved = step_folders(run)
    try:
        yield
    except ConfigError:
        if step_folders(run) == saved:
            with suppress(OSError):
                for path, content in before.items():
                    path.write_bytes(content)
        raise


def _starts_over(error: ConfigError) -> bool:
    return error.fix.get("resume") == NEVER


def _not_typed_again(run: Path, words: Sequence[str]) -> dict[str, str]:
    """What the overrides of an earlier run set, without the keys of these words."""
    now = {override_key(word) for word in words}
    return {key: value for key, value in values_by_key(overrides_of_run(run)).items() if key not in now}
