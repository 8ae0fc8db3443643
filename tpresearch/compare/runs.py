"""Runs as they are found on disk: in the folders, sweeps and globs that were typed."""

from __future__ import annotations

import difflib
import glob
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from yaml import YAMLError

from tpresearch.config.compared import compared
from tpresearch.config.errors import ConfigError
from tpresearch.launch.command import WrongCommand, python_command
from tpresearch.launch.run_dir import EARLIER
from tpresearch.track.names import Row, finite
from tpresearch.track.record import read_metrics, read_summary
from tpresearch.track.shown import path_text

RECORD = ("config.yaml", "summary.json", "metrics.jsonl", "console.log")
"""Files by which the folder of a run is told, one of a sweep's job that failed early included."""
NEEDED = {"status": str, "world_size": int, "mesh": dict, "model": str, "parallel": str}
"""What a summary has to hold to be put beside others."""
LEGAL = "folders of runs or sweeps, or globs of them"


class Unreadable(Exception):
    """A run whose record cannot be compared; says which file, and why."""


@dataclass(frozen=True)
class Run:
    folder: Path
    config: dict[str, Any]
    summary: dict[str, Any]
    rows: list[Row] = field(repr=False)
    """Its metrics by step."""
    ledger: dict[str, Any]
    """What one step sent and held; empty where the run ended before it was counted."""

    @property
    def completed(self) -> bool:
        return self.summary["status"] == "completed"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The compared config by dotted keys, with the ranks, mesh sizes and device that the run had in place of those asked for."""
        flat = flatten({key: value for key, value in compared(self.config).items() if key != "mesh"})
        sizes = {f"mesh.{axis}": size for axis, size in self.summary["mesh"].items()}
        return {"ranks": self.summary["world_size"], **sizes, **flat, "device": self.summary.get("device")}


@dataclass(frozen=True)
class Found:
    runs: list[Run]
    left_out: list[str]
    """A sentence for each run that is there and cannot be read."""
    sweep: Path | None
    """The sweep's folder, where one was given and nothing else."""


def find(words: Sequence[str]) -> Found:
    """The runs that these words name, in order, each once.

    A run that is named itself has to be readable; one that is found in a sweep or by a glob is left out if it is not.

    Raises:
        ConfigError: for a word that names no run, or one that cannot be read; where no run can be read.
    """
    runs: dict[Path, Run] = {}
    left_out: dict[Path, str] = {}
    sweep = None
    for word in words:
        folders = _folders(word)
        for folder in folders:
            where = folder.resolve()
            try:
                runs[where] = runs.get(where) or read(folder)
            except Unreadable as problem:
                if folders == [Path(word).expanduser()]:
                    raise _refused(word, str(problem), "runs that have ended") from None
                left_out[where] = f"{path_text(folder)}: {problem}"
        path = Path(word).expanduser()
        sweep = path if len(words) == 1 and path.is_dir() and folders != [path] else None
    if not runs:
        first = next(iter(left_out.values()))
        raise _refused(" ".join(words), f"none can be read: {first}", "runs that have ended")
    return Found(list(runs.values()), list(left_out.values()), sweep)


def _folders(word: str) -> list[Path]:
    """The folders of runs that a word names; it is a glob where no file has that very name."""
    path = Path(word).expanduser()
    if path.exists():
        paths = [path]
    elif glob.has_magic(word):
        paths = sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not paths:
            raise _refused(word, "this glob matches nothing")
        if EARLIER not in word:
            paths = [each for each in paths if EARLIER not in str(each)]
    else:
        raise _refused(word, "there is no such folder", instead=_beside(path))
    folders = [folder for each in paths for folder in run_folders(each)]
    if not folders:
        raise _refused(word, "there is no run in it")
    return folders


def _beside(path: Path) -> Path | None:
    """The folder of nearly the same name that lies where a mistyped one should."""
    parent = next((each for each in path.parents if each.is_dir()), Path())
    wrong = path.relative_to(parent).parts[0]
    near = difflib.get_close_matches(wrong, [each.name for each in parent.iterdir() if each.is_dir()], 1)
    return Path(parent, near[0], *path.relative_to(parent).parts[1:]) if near else None


def _refused(word: str, why: str, legal: str = LEGAL, instead: Path | None = None) -> ConfigError:
    """With the same command to try, but for the word: another in its place, or none."""
    others = [other for other in sys.argv[1:] if other != word]
    typed = [str(instead) if other == word else other for other in sys.argv[1:]] if instead else others
    named = [other for other in typed if "=" not in other]
    return WrongCommand("run", word, why, legal, python_command(typed if named else ["outputs", *typed]))


def run_folders(path: Path) -> list[Path]:
    """The folder itself if it is a run's, else those of the runs below it, jobs in their order.

    What a sweep has set aside is none of them: the job was started anew beside it.
    """
    if _is_run(path):
        return [path]
    below = {file.parent for name in RECORD for file in path.rglob(name)}
    visible = [folder for folder in below if not _is_hidden(folder.relative_to(path))]
    return sorted(visible, key=lambda folder: [_in_order(part) for part in folder.parts])


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in RECORD)


def _is_hidden(path: Path) -> bool:
    """Hydra's and W&B's own, in which there are files of the same names, and earlier starts of a sweep's job."""
    return any(part == "wandb" or part.startswith(".") or EARLIER in part for part in path.parts)


def _in_order(part: str) -> tuple[int, int, str]:
    return (0, int(part), "") if part.isdecimal() else (1, 0, part)


def read(folder: Path) -> Run:
    """A run from its record.

    Raises:
        Unreadable: for a run that has not ended, and for a file that is not what a run writes.
    """
    summary = _checked(folder, "summary.json", lambda: read_summary(folder))
    for key, kind in NEEDED.items():
        if not isinstance(summary.get(key), kind):
            raise Unreadable(f"summary.json is none of a run's: {key} is {summary.get(key, 'missing')!r}")
    for key, value in flatten({key: value for key, value in summary.items() if "/" in key}).items():
        if not isinstance(value, int | float | None) and value != {}:
            raise Unreadable(f"summary.json is none of a run's: {key} is {value!r}")
    config = _checked(folder, "config.yaml", lambda: _yaml(folder / "config.yaml"))
    for group in ("train", "data", "tokenizer"):
        if not isinstance(config.get(group), dict):
            raise Unreadable(f"config.yaml is none of a run's: {group} is missing")
    rows = _rows(folder)
    if not rows and summary["status"] == "completed":
        raise Unreadable("metrics.jsonl has no rows, though the run is completed")
    ledger = {}
    if (folder / "ledger.json").exists():
        ledger = _checked(folder, "ledger.json", lambda: json.loads((folder / "ledger.json").read_text()))
        for entry in [*(ledger.get("measured") or []), *(ledger.get("expected") or [])]:
            if not isinstance(entry, dict) or not entry.keys() >= {"axis", "collective", "sent_bytes"}:
                raise Unreadable(f"ledger.json is none of a run's: {entry!r}")
    return Run(folder, config, summary, rows, ledger)


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _checked(folder: Path, name: str, load: Callable[[], Any]) -> dict[str, Any]:
    try:
        content = load()
    except FileNotFoundError:
        why = " (still running, refused, or killed on the spot)" if name == "summary.json" else ""
        raise Unreadable(f"it has no {name}{why}") from None
    except (OSError, ValueError, YAMLError) as error:
        raise Unreadable(f"{name} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise Unreadable(f"{name} is none of a run's: {type(content).__name__} in place of keys and values")
    return content


def _rows(folder: Path) -> list[Row]:
    try:
        return [{name: finite(value) for name, value in row.items()} for row in read_metrics(folder)]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise Unreadable(f"metrics.jsonl cannot be read: {why}") from None


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train": {"seed": 0}}` -> `{"train.seed": 0}`; lists stay whole."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) and value else {name: value}
    return flat
