"""Where a study writes its results: below outputs/, so that measuring changes no tracked file, unless RECORD=1."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def place(study: Path) -> Path:
    """The study's own folder with RECORD=1 in the environment, else outputs/experiments/<its name>."""
    if os.environ.get("RECORD") == "1":
        return study
    folder = Path("outputs/experiments") / study.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def latest(study: Path, name: str) -> Path:
    """A file of the study: as it was last measured here, else as it is recorded."""
    measured = Path("outputs/experiments") / study.name / name
    return measured if measured.exists() and os.environ.get("RECORD") != "1" else study / name


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]], append: bool = False) -> None:
    """Rows as a CSV with the columns of the first one, or below those that are in it already."""
    with path.open("a" if append else "w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), restval="")
        if file.tell() == 0:
            table.writeheader()
        table.writerows(rows)
