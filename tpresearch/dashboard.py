"""`python -m tpresearch.dashboard group=...`: save a W&B workspace and a report that compare the runs of a group."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from tpresearch.config.errors import ConfigError, first_line, refuse_unwritable
from tpresearch.config.network import is_reachable
from tpresearch.config.schema import LoggerConfig
from tpresearch.launch.command import WrongCommand
from tpresearch.launch.options import command, read_options
from tpresearch.launch.run_dir import writable_folder
from tpresearch.track.record import write_json
from tpresearch.track.text import path_text
from tpresearch.track.wandb_host import has_key
from tpresearch.track.wandb_run import set_up

if TYPE_CHECKING:
    import wandb

SYMBOL = r"[^\w\s./:,()#-]"
"""What a workspace's name may not hold: the client takes neither lr=0.1 nor an emoji."""


@dataclass
class Options:
    group: str = MISSING
    """The W&B group whose runs are compared: a sweep's, or `logger.group`."""
    project: str = field(default_factory=lambda: os.environ.get("WANDB_PROJECT") or LoggerConfig().project)
    """W&B project of the runs; by default $WANDB_PROJECT, else tpresearch."""
    entity: str | None = None
    """Team or user that owns the project; null for the account's default."""
    name: str | None = None
    """Name of the workspace and the report; null for `<group> by plan`."""
    report: bool = True
    """Also write a report."""
    dry_run: bool = False
    """Write the JSON without contacting W&B."""
    out: str | None = None
    """Folder for the JSON; null for outputs/dashboard/<group>."""


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    if importlib.util.find_spec("wandb_workspaces") is None:
        why, legal = "wandb-workspaces is not installed", "the extra `dashboard`"
        raise WrongCommand("group", options.group, why, legal, "pip install 'tpresearch[dashboard]'")
    if options.dry_run:
        write(options)
        return
    _require_host(set_up())
    try:
        save(options)
    except ConfigError:
        raise
    except Exception as error:  # whatever the client raises where a request fails
        print(f"error: W&B did not save the dashboard: {first_line(error)}", file=sys.stderr)
        sys.exit(1)


def write(options: Options) -> None:
    """Write the JSON that W&B would be sent; the default folder is never outside of outputs/."""
    parts = [part for part in Path(options.group).parts if part not in ("/", "..")]
    folder = Path(os.path.expanduser(options.out)) if options.out else Path("outputs", "dashboard", *parts)
    for kind, view in _views(options, options.entity or "").items():
        path = folder / f"{kind}.json"
        content = view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
        with refuse_unwritable("out", folder, {"out": writable_folder("dashboard")}):
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, content)
        print(f"{kind:<10} {path_text(path)}")


def save(options: Options) -> None:
    """Save a new workspace and a new report, whatever was saved before."""
    import wandb

    api = wandb.Api()
    entity = options.entity or api.settings["entity"] or api.default_entity
    if not entity:
        raise ValueError("the account has no default entity; add entity=<team or user>")
    for kind, view in _views(options, entity).items():
        view.save()
        print(f"{kind:<10} {view.url}")


def _views(options: Options, entity: str) -> dict[str, Any]:
    from pydantic import ValidationError

    from tpresearch.compare import workspace as views

    name = options.name or f"{re.sub(SYMBOL, '-', options.group)[:100]} by plan"
    where = options.group, name, options.project, entity
    try:
        workspace = {"workspace": views.workspace(*where)}
        report = {"report": views.report(*where, lookup=not options.dry_run)} if options.report else {}
    except ValidationError as error:
        why, legal = error.errors()[0]["msg"], "at most 128 letters, digits, spaces and punctuation"
        raise ConfigError("name", name, why, legal, fix={"name": None}) from None
    return workspace | report


def _require_host(settings: wandb.Settings) -> None:
    if not has_key(settings):
        why, legal = "there is no W&B API key", "a key by `wandb login` or WANDB_API_KEY, or a dry run"
    elif not is_reachable(settings.base_url):
        why, legal = f"{settings.base_url} does not answer", "a host that does (WANDB_BASE_URL), or a dry run"
    else:
        return
    raise ConfigError("dry_run", False, why, legal, fix={"dry_run": True})


if __name__ == "__main__":
    command(main, Options)
