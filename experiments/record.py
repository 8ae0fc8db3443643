"""Where a study writes its results: below outputs/, so that measuring changes no tracked file, unless RECORD=1."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any


def place(study: Path) -> Path:
    """The study's own folder with RECORD=1 in the environment, else outputs/experiments/<its name>."""
    if os.environ.get("RECORD") == "1":
        return study
    folder = Path("outputs/experiments") / study.name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def read_rows(study: Path, name: str) -> list[dict[str, Any]]:
    """The rows of a CSV of the study: as it was last measured here, else as it is recorded."""
    measured = Path("outputs/experiments") / study.name / name
    path = measured if measured.exists() and os.environ.get("RECORD") != "1" else study / name
    with path.open(newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def write_rows(
    path: Path, rows: Sequence[Mapping[str, Any]], append: bool = False, heading: str = ""
) -> None:
    """Rows as a CSV with each column that one of them has, or below those that are in it already."""
    with path.open("a" if append else "w", newline="") as file:
        table = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row), restval="")
        if file.tell() == 0:
            file.write(heading)
            table.writeheader()
        table.writerows(rows)


def made_by(study: Path) -> str:
    """A heading that says how and when a table was made."""
    return f"# python experiments/{study.name}/measure.py, torch {version('torch')}, {date.today()}\n"
