"""`resume=RUN`: what was typed when a run was started is typed again, in its folder; what is typed now wins."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from tpresearch.checkpoint.resume import AUTO, NEVER, check_begun, find_checkpoint, run_of
from tpresearch.config.errors import ConfigError
from tpresearch.launch.command import override, override_key

ANEW = ("resume", "hydra.run.dir", "plan_only")
"""Keys that are for one start of a run alone."""
REPLACED = {"parallel": ("parallel", "mesh")}
"""Choosing a plan now puts aside what was typed of the one before, mesh sizes included."""


def type_again(arguments: Namespace) -> Path | None:
    """Where `resume` names a run, make this command line the one that started it, with what is typed now on top.

    Returns: the run's folder, or None where no run is named.

    Raises:
        ConfigError: where there is no such run, or another folder is asked for as well.
    """
    typed: dict[str, str] = {override_key(word): word.partition("=")[2] for word in arguments.overrides}
    text = typed.get("resume", AUTO)
    unquoted = yaml.safe_load(text)
    named = unquoted if isinstance(unquoted, str) else text or "null"
    if named in (AUTO, NEVER):
        return None
    if arguments.multirun or typed.get("hydra.mode") == "MULTIRUN":
        why = "the jobs of a sweep have folders of their own"
        legal = "init_from, for new runs from its weights"
        raise ConfigError("resume", named, why, legal, fix={"resume": None, "init_from": named})
    check_begun(find_checkpoint(Path(named), "resume"))
    run = run_of(Path(named))
    asked = typed.get("hydra.run.dir")
    if asked is not None and Path(str(yaml.safe_load(asked))).resolve() != run:
        why = f"resume={named} goes on in that run's own folder"
        legal = "no other one; init_from takes weights into a new run"
        raise ConfigError("hydra.run.dir", asked, why, legal)
    replaced = {branch for key in typed for branch in REPLACED.get(key, (key,))}
    then = [word for word in typed_then(run) if not _is_in(override_key(word), replaced)]
    now = [word for word in arguments.overrides if override_key(word) != "hydra.run.dir"]
    where = [] if typed.get("plan_only") == "true" else [override("hydra.run.dir", run)]
    arguments.overrides = [*then, *now, *where]
    hydra = _read(run / ".hydra" / "hydra.yaml")["hydra"]
    arguments.config_name = arguments.config_name or hydra["job"]["config_name"]
    added = [s["path"] for s in hydra["runtime"]["config_sources"] if s["provider"] == "command-line"]
    arguments.config_dir = arguments.config_dir or next(iter(added), None)
    return run


def typed_then(run: Path) -> list[str]:
    """The overrides with which a run was last started, as Hydra keeps them.

    Raises:
        ConfigError: where there is no such record.
    """
    task = _read(run / ".hydra" / "overrides.yaml")
    hydra = _read(run / ".hydra" / "hydra.yaml")["hydra"]["overrides"]["hydra"]
    searched = [word for word in hydra if override_key(word) == "hydra.searchpath"]
    return [word for word in [*searched, *task] if override_key(word) not in ANEW]


def _is_in(key: str, branches: set[str]) -> bool:
    return any(key == branch or key.startswith(f"{branch}.") for branch in branches)


def _read(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = f"what was typed for it cannot be read: {getattr(error, 'strerror', None) or error}"
        raise ConfigError("resume", path.parent.parent, why, "a run folder with its .hydra") from None
