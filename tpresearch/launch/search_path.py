"""Folders of config files: those that are not there, and files in them that Hydra does not read, are refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from tpresearch.config.errors import ConfigError

FILE = "file://"
"""Before a folder of a search path."""


def refuse_search_path(typed: str) -> None:
    """Refuse a search path that is no list, or whose folder is not there, for which Hydra only warns."""
    key, legal = "hydra.searchpath", "folders of config files, such as [file://mine/conf]"
    with suppress(HydraException):  # which is said where it is composed
        places = OverridesParser.create().parse_override(f"{key}={typed}").value()
        if isinstance(places, str):
            raise ConfigError(key, places, "no list", legal, fix={key: f"[{places}]"})
        for place in places if isinstance(places, list) else []:
            folder = str(place).removeprefix(FILE)
            if "://" not in folder and not Path(folder).is_dir():
                raise ConfigError(key, place, "no such folder", legal, fix={key: "VALUE"})


def refuse_unread_files(runtime: DictConfig) -> None:
    """Refuse a folder that was added, if it has a file under the name of one that was read and is another: Hydra looks in its own
    folder first.

    Args:
        runtime: `hydra.runtime` of what was composed.
    """
    own, *added = (source for source in runtime.config_sources if source.schema == "file")
    chosen = [f"{group}/{option}" for group, option in runtime.choices.items()] if added else []
    for read in (path for name in chosen for path in _files_read(Path(own.path), name)):
        name = read.relative_to(own.path)
        for source in added:
            unread = Path(source.path) / name
            if unread.is_file() and unread.read_bytes() != read.read_bytes():
                key, drop = "hydra.searchpath", {"hydra.searchpath": None}
                if source.provider == "command-line":
                    words = (word for word in sys.argv if str(Path(word).absolute()) == source.path)
                    key, drop = "--config-dir", dict.fromkeys(["--config-dir", "-cd", *words])
                why = f"its {name} is not read, since {read} has that name and comes first"
                raise ConfigError(key, source.path, why, "a file with a name of its own", drop)


def _files_read(folder: Path, name: str) -> Iterator[Path]:
    """An option's file, if it is there, and those in its defaults: `model/llama2_7b`, `plan/llama2`."""
    if not (path := folder / f"{name}.yaml").is_file():
        return
    yield path
    content = OmegaConf.load(path)
    for entry in content.get("defaults") or [] if isinstance(content, DictConfig) else ():
        base = str(entry).partition("@")[0]
        inside = base.lstrip("/") if base.startswith("/") else f"{name.rpartition('/')[0]}/{base}"
        yield from _files_read(folder, inside)
