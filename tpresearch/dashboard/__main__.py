"""`python -m tpresearch.dashboard group=...`: a W&B workspace and a report that compare the runs of a group."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import MISSING

from tpresearch.config.errors import ConfigError
from tpresearch.config.network import answers
from tpresearch.config.schema import LoggerConfig
from tpresearch.launch.command import WrongCommand
from tpresearch.launch.options import command, read_options
from tpresearch.track.shown import path_text
from tpresearch.track.wandb_host import has_key
from tpresearch.track.wandb_run import set_up

if TYPE_CHECKING:
    import wandb

SYMBOL = r"[^\w\s./:,()#-]"


@dataclass
class Options:
    group: str = MISSING
    """The W&B group whose runs are compared: a sweep's, or `logger.group`."""
    project: str = LoggerConfig.project
    entity: str | None = None
    """The team or user whose project it is; null for the account's default."""
    name: str | None = None
    """Of the workspace and the report; null for `<group> by plan`."""
    report: bool = True
    dry_run: bool = False
    """Write the JSON and ask W&B nothing."""
    out: str | None = None
    """Folder of the JSON; null for outputs/dashboard/<group>."""


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    _require_client(options.group)
    if options.dry_run:
        write(options)
        return
    settings = set_up()
    _require_host(settings)
    try:
        save(options)
    except ConfigError:
        raise
    except Exception as error:  # whatever its client raises where a request fails
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"error: W&B did not save the dashboard: {first}", file=sys.stderr)
        sys.exit(1)


def write(options: Options) -> None:
    """The JSON that W&B would be sent, in files."""
    folder = Path(options.out) if options.out else _folder(options.group)
    for kind, view in _views(options, options.entity or "").items():
        path = folder / f"{kind}.json"
        content = view._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            why, legal = error.strerror or "cannot be written", "a folder that can be written"
            raise ConfigError("out", folder, why, legal, fix={"out": "dashboard"}) from None
        print(f"{kind:<10} {path_text(path)}")


def _folder(group: str) -> Path:
    """Of a group such as train/2026-11-23/06-00-00; never outside of outputs."""
    parts = [part for part in Path(group).parts if part not in ("/", "..")]
    return Path("outputs", "dashboard", *parts)


def save(options: Options) -> None:
    """A new workspace and a new report, whatever was saved before."""
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

    from tpresearch.dashboard import views

    # A workspace may be called neither lr=0.1 nor by an emoji: its client takes both for one.
    name = options.name or f"{re.sub(SYMBOL, '-', options.group)[:100]} by plan"
    place = options.group, name, options.project, entity
    try:
        workspace = {"workspace": views.workspace(*place)}
        return workspace | (
            {"report": views.report(*place, lookup=not options.dry_run)} if options.report else {}
        )
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        legal = "at most 128 letters, digits, spaces and punctuation"
        raise ConfigError("name", name, why, legal, fix={"name": None}) from None


def _require_client(group: str) -> None:
    if importlib.util.find_spec("wandb_workspaces") is None:
        why, legal = (
            "wandb-workspaces, which this needs, is not installed",
            "the extra tpresearch[dashboard] has it",
        )
        raise WrongCommand("group", group, why, legal, "pip install 'wandb-workspaces>=0.4.13'")


def _require_host(settings: wandb.Settings) -> None:
    if not has_key(settings):
        why, legal = "there is no W&B API key", "a key by `wandb login` or WANDB_API_KEY, or a dry run"
    elif not answers(settings.base_url):
        why, legal = f"{settings.base_url} does not answer", "a host that does (WANDB_BASE_URL), or a dry run"
    else:
        return
    raise ConfigError("dry_run", False, why, legal, fix={"dry_run": True})


if __name__ == "__main__":
    command(main)
