"""A run under injected faults, restarted until it is done, compared with an undisturbed run."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.job import CELLS, IN_LOADS, IN_SAVES, IN_STEPS, KEEP, Fault, start
from support.checkpointed import State, apart, on_disk

from tpresearch.checkpoint.disk import (
    CHECKPOINTS_FOLDER,
    BrokenCheckpoint,
    find_damage,
    read_checkpoint,
    step_folders,
)
from tpresearch.track.record import read_summary

TOLERANCE = 1e-10
COLUMNS = ("train/loss", "train/grad_norm", "train/lr")
OF_RANK_ZERO = ("metadata", "settled", "marked", "renamed", "pruning")
STARTS = 6
"""After which a run is given up."""
POINTS = (*IN_STEPS, *IN_SAVES, *IN_LOADS)
KINDS = ("kill", "full", "error", "term", "kill_all")


@dataclass
class Survived:
    """What became of a run."""

    number: int
    history: list[str] = field(default_factory=list)
    """Of each start: its plan, what befell it, and the exit codes of its ranks."""
    problems: list[str] = field(default_factory=list)
    apart: float = 0.0
    """The greatest relative difference of any tensor or figure from the run that nothing befell."""


@dataclass(frozen=True)
class Reference:
    rows: list[dict[str, Any]]
    state: State


def reference(folder: Path) -> Reference:
    """The same run on one process, undisturbed."""
    folder.mkdir(parents=True)
    assert start("none", folder) == [0]
    return read_reference(folder)


def read_reference(folder: Path) -> Reference:
    return Reference(rows_of(folder), on_disk(step_folders(folder)[-1]))


def drawn(number: int, seed: int) -> tuple[list[str], list[Fault | None], list[str]]:
    """Of one run: the plan of each start, the fault of each, and further overrides."""
    draw = random.Random(f"{seed}:{number}")
    small = [cell for cell, (size, _) in CELLS.items() if size <= 2]
    large = [cell for cell, (size, _) in CELLS.items() if size > 2]
    cells = [draw.choice(small) for _ in range(STARTS)]
    if number % 10 == 9:
        cells[draw.randrange(2)] = draw.choice(large)
    point, kind = POINTS[number % len(POINTS)], KINDS[number // len(POINTS) % len(KINDS)]
    if kind == "full" and point not in IN_SAVES:
        kind = "kill"
    faults: list[Fault | None]
    if point in IN_LOADS:  # which only a start that goes on passes
        faults = [Fault("step", 4, "kill", draw.randrange(4)), Fault(point, 0, kind, draw.randrange(4))]
    else:
        rank = 0 if point in OF_RANK_ZERO else draw.randrange(4)
        faults = [Fault(point, 0 if point == "pruning" else draw.randrange(3), kind, rank)]
        if draw.random() < 0.3:
            second = draw.choice(POINTS), draw.randrange(2), draw.choice(("kill", "term")), draw.randrange(4)
            faults.append(Fault(*second))
    faults += [None] * (STARTS - len(faults))
    beside = ["checkpoint.background=true"] if draw.random() < 0.3 else []
    return cells, faults, beside


def survive(number: int, seed: int, folder: Path, whole: Reference) -> Survived:
    """Start a run until all of its ranks end with 0; look at the disk after every death, and at everything at the end."""
    folder.mkdir(parents=True)
    survived = Survived(number)
    cells, faults, beside = drawn(number, seed)
    for cell, fault in zip(cells, faults, strict=True):
        codes = start(cell, folder, fault, *beside)
        survived.history.append(f"{cell}{' beside' if beside else ''}, {fault or 'nothing'}: {codes}")
        survived.problems += find_problems(folder)
        if "hung" in codes:
            survived.problems.append("a rank hung")
        if all(code == 0 for code in codes):
            break
    else:
        survived.problems.append(f"not done after {STARTS} starts")
        return survived
    compare(folder, whole, survived)
    if not survived.problems:
        shutil.rmtree(folder)
        for said in folder.parent.glob(f"{folder.name}.rank*.txt"):
            said.unlink()
    return survived


def find_problems(folder: Path) -> list[str]:
    """What is called a checkpoint and is not whole, to the byte."""
    found = []
    for each in step_folders(folder):
        try:
            checkpoint = read_checkpoint(each)
        except BrokenCheckpoint as error:
            found.append(f"{each.name}: {error}")
            continue
        if wrong := find_damage(each, checkpoint.manifest.files.items()):
            found.append(wrong)
    return found


def compare(
    folder: Path, whole: Reference, survived: Survived, tolerance: float = TOLERANCE, keep: int | None = KEEP
) -> None:
    """Note what differs of a run from the one that nothing befell: rows, the last checkpoint, and what is left in its folder."""
    rows = rows_of(folder)
    steps = [row["train/step"] for row in rows]
    if steps != [row["train/step"] for row in whole.rows]:
        survived.problems.append(f"rows of steps {steps}")
        return
    figures = [
        (row[name], right[name]) for row, right in zip(rows, whole.rows, strict=True) for name in COLUMNS
    ]
    folders = step_folders(folder)
    if not folders or folders[-1].name != f"step-{steps[-1]:08d}":
        survived.problems.append(f"the last checkpoint is {folders[-1:]}")
        return
    differences = [abs(ours - right) / abs(right) for ours, right in figures]
    survived.apart = max(survived.apart, *differences, apart(on_disk(folders[-1]), whole.state))
    if survived.apart > tolerance:
        survived.problems.append(f"apart by {survived.apart:.1e}")
    if keep and len(folders) > keep:
        survived.problems.append(f"{len(folders)} checkpoints are kept")
    if drafts := list((folder / CHECKPOINTS_FOLDER).glob(".step-*")):
        survived.problems.append(f"left: {[draft.name for draft in drafts]}")
    if (status := read_summary(folder)["status"]) != "completed":
        survived.problems.append(f"status {status}")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
