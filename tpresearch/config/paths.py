"""Paths of a config, resolved where they were typed: hydra.job.chdir=true puts the run into another folder."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from tpresearch.config.schema import Config

FOLDERS = ("data.cache_dir", "logger.dir")
"""Keys of folders that may have to be made."""
PATHS = ("data.path", "tokenizer.path", "init_from", "resume")
"""Keys of what is there already; where nothing is, the value is no path but a name, as of a data set on the hub."""


def resolve_paths(cfg: Config) -> None:
    """Make relative paths absolute, in place."""
    for key in (*FOLDERS, *PATHS):
        branch, _, name = key.rpartition(".")
        owner = getattr(cfg, branch) if branch else cfg
        setattr(owner, name, _resolved(getattr(owner, name), always=key in FOLDERS))


def _resolved(value: Any, always: bool) -> Any:
    if isinstance(value, list):
        return [_resolved(item, always) for item in value]
    if not isinstance(value, str) or not value.strip():
        return value
    path = Path(value).expanduser()
    return str(path.absolute()) if always or path.exists() or glob.glob(str(path), recursive=True) else value
