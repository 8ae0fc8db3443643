"""Ownership of run folders: one run locks a folder, and an earlier record that is not resumed is set aside."""

from __future__ import annotations

import errno
import itertools
import os
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO

from tpresearch.checkpoint.disk import step_folders
from tpresearch.config.errors import ConfigError, Fix
from tpresearch.config.locks import lock

EARLIER_SUFFIX = ".earlier-"
"""Suffix of a folder in which an earlier record was set aside, before its number."""

RECORD_FILES = ("config.yaml", "plan.txt", "metrics.jsonl", "summary.json", "ledger.json")
"""Files that a training writes; those of a second one would mix with them."""
OTHER_RECORDS = ("simulate.json", "planner.json", "verify.json")
"""Those of commands that do not train: one that is stopped would leave an earlier one's beside its own config."""
RECORD_FOLDERS = (".hydra", "ranks", "wandb", "tensorboard", "profiler", "tokenizer", "checkpoints")
RUN_FILES = (
    *(*RECORD_FILES, "*.step-*", "metrics.cut.jsonl", "resumed.json"),
    *(*OTHER_RECORDS, "trace.json", "planner.png", "train.log"),
    *RECORD_FOLDERS,
)
"""Patterns of all files that a run leaves in its folder. Any others are the user's and stay."""
POLL_S = 0.05
RUN_MARKERS = (".hydra", "metrics.jsonl", "summary.json")
"""A folder without any of these was never a run's."""


def lock_folder(
    folder: Path, timeout_s: float = 0, key: str = "hydra.run.dir", elsewhere: Fix = None
) -> AbstractContextManager[object]:
    """Lock the folder of a run or a sweep until the context is left, or this process ends in any way. Refuses one that another has.

    Args:
        timeout_s: how long to wait for the holder of the lock.
        key: the config key that names the folder.
        elsewhere: the fix of the refusal; by default another folder.

    Raises:
        OSError: if it cannot be locked.
    """
    file, until = (folder / ".lock").open("a"), time.monotonic() + timeout_s
    while not _lock(file):
        if time.monotonic() >= until:
            file.close()
            why = f"another {key.split('.')[1]} is using this folder"
            legal = "wait for its end, or use another folder"
            raise ConfigError(key, folder, why, legal, elsewhere or {key: free_name(folder, "-")})
        time.sleep(POLL_S)
    return file


def _lock(file: IO[str]) -> bool:
    """`lock`; on a file system without locks nobody has any, since a file in their place would outlive a process that is killed."""
    try:
        return lock(file)
    except OSError as error:
        if error.errno != errno.ENOLCK:
            raise
    return True


def check_left_by_run(folder: Path) -> None:
    """Refuse a folder with files that this run would overwrite and that no run left there."""
    found = [name for name in RECORD_FILES if (folder / name).exists()]
    if found and not any((folder / name).exists() for name in RUN_MARKERS):
        why = f"holds {' and '.join(found)} not left there by a run"
        legal = "an empty folder, or a new one"
        raise ConfigError("hydra.run.dir", folder, why, legal, fix={"hydra.run.dir": folder / "run"})


def check_files(folder: Path, elsewhere: Fix = None) -> None:
    """Refuse a folder with something else where a run has a file or a folder of its own, or with another user's.

    Args:
        elsewhere: as of `lock_folder`.
    """
    of_hydra = (f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides"))
    files = [*RECORD_FILES, *OTHER_RECORDS, "metrics.cut.jsonl", "resumed.json", "train.log", *of_hydra]
    for name in (*RECORD_FOLDERS, *files):
        path, is_file = folder / name, name in files
        if not os.path.lexists(path):
            continue
        if not (path.is_file() if is_file else path.is_dir()):
            why = f"its {name} is not a {'file' if is_file else 'folder'}"
        elif not os.access(path, os.R_OK | os.W_OK, effective_ids=os.access in os.supports_effective_ids):
            why = f"its {name} may not be read and written by user {os.geteuid()}"
        else:
            continue
        key, legal = (
            "hydra.run.dir",
            "a folder in which that is this user's, as a run leaves it, or is not there",
        )
        raise ConfigError(key, folder, why, legal, elsewhere or {key: free_name(folder, "-")})


def set_aside_record(folder: Path) -> None:
    """Move an earlier run's files to a folder beside its own, or inside of it if they cannot be moved there, as to another disk. Where
    no run was, folders of these names are the user's, and stay."""
    if not (
        step_folders(folder) or any((folder / name).exists() for name in (*RECORD_FILES, *OTHER_RECORDS))
    ):
        return
    first, *others = (path for pattern in RUN_FILES for path in folder.glob(pattern))
    aside = free_name(folder, EARLIER_SUFFIX)
    try:
        _move_to_new(aside, first)
    except OSError:
        aside = free_name(folder / "run", EARLIER_SUFFIX)
        _move_to_new(aside, first)
    for path in others:
        path.rename(aside / path.name)
    print(f"the record of an earlier run in {folder} is now in {aside}", file=sys.stderr)


def _move_to_new(folder: Path, path: Path) -> None:
    folder.mkdir()
    try:
        path.rename(folder / path.name)
    except OSError:
        folder.rmdir()
        raise


def free_name(folder: Path, between: str) -> Path:
    """An unused sibling name: the folder's own with a counter."""
    if folder.name in ("", ".."):  # of `.` and `..`, which stand for another name
        folder = folder.resolve()
    first = 1 if between == EARLIER_SUFFIX else 2
    names = (folder.with_name(f"{folder.name}{between}{nth}") for nth in itertools.count(first))
    return next(name for name in names if not os.path.lexists(name))
