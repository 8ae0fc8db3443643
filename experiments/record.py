"""Where a study writes its results: below outputs/, so that measuring changes no tracked file, unless RECORD=1."""

from __future__ import annotations

import os
from pathlib import Path


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
