"""Ownership of run folders: one run locks a folder, and an earlier record that is not resumed is set aside."""

from __future__ import annotations

import itertools
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from filelock import FileLock, Timeout

from tpresearch.config.errors import ConfigError

EARLIER = ".earlier-"
"""In the name of a folder in which an earlier record was set aside, before its count."""

RECORD = ("config.yaml", "plan.txt", "metrics.jsonl", "summary.json", "ledger.json")
"""What a training writes; a second one would mix with it."""
LEFT = (
    *RECORD,
    "*.step-*",
    "metrics.cut.jsonl",
    "resumed.json",
    ".hydra",
    "train.log",
    "ranks",
    "wandb",
    "checkpoints",
)
"""All files that a run leaves in its folder, as name patterns. Any others are the user's and stay."""
SIGNS = (".hydra", "metrics.jsonl", "summary.json")
"""A folder with none of these was never a run's."""


def locked(folder: Path, patience_s: float = 0, key: str = "hydra.run.dir") -> AbstractContextManager[object]:
    """Holds a run's folder, or a sweep's, against others until it is left, or this process ends in whatever way.

    Args:
        patience_s: how long to wait for the holder.
        key: that names the folder.

    Raises:
        ConfigError: if another run or sweep has it.
        OSError: if it cannot be held.
    """
    try:
        return FileLock(folder / ".lock").acquire(timeout=patience_s)
    except Timeout:
        why = f"another {key.split('.')[1]} is using this folder"
        legal = "wait for its end, or use another folder"
        raise ConfigError(key, folder, why, legal, fix={key: free_name(folder, "-")}) from None
    except NotImplementedError:  # a file system without locks: nothing can be held there
        return nullcontext()


def check_ours(folder: Path) -> None:
    """Refuse a folder whose files this run would write over although no run has left them there.

    Raises:
        ConfigError: naming them.
    """
    found = [name for name in RECORD if (folder / name).exists()]
    if found and not any((folder / name).exists() for name in SIGNS):
        why = f"holds {' and '.join(found)} not left there by a run"
        legal = "an empty folder, or a new one"
        raise ConfigError("hydra.run.dir", folder, why, legal, fix={"hydra.run.dir": folder / "run"})


def make_room(folder: Path) -> None:
    """Set aside what an earlier run has left in the folder."""
    if not any((folder / name).exists() for name in (*RECORD, "checkpoints")):
        return
    aside = free_name(folder, EARLIER)
    aside.mkdir()
    for pattern in LEFT:
        for path in folder.glob(pattern):
            path.rename(aside / path.name)
    print(f"the record of an earlier run in {folder} is now in {aside}", file=sys.stderr)


def free_name(folder: Path, between: str) -> Path:
    """An unused sibling name: the folder's own with a counter."""
    first = 1 if between == EARLIER else 2
    names = (folder.with_name(f"{folder.name}{between}{nth}") for nth in itertools.count(first))
    return next(name for name in names if not os.path.lexists(name))
