"""Damage to a run's folder between two starts, and the required outcome of the second."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from faults.exam import Reference, Survived, compare, find_problems
from faults.job import CELLS, Fault, start
from support.checkpointed import calls

from tpresearch.checkpoint.disk import (
    MANIFEST_FILE,
    WrittenFile,
    checksum,
    manifest_text,
    parse_manifest,
    step_folders,
)
from tpresearch.track.record import read_resumptions

STOPPED_AT = 4
"""Steps done by the first start; it leaves checkpoints of steps 2 and 4."""
GOES_ON, ANEW, REFUSED = "goes on", "begins anew", "refused"


@dataclass(frozen=True)
class Damage:
    what: str
    do: Callable[[Path], object]
    """To the run folder."""
    then: str = GOES_ON
    from_step: int = 2
    """Where it goes on: from 4 where the newest checkpoint is as it was."""


def newest(run: Path) -> Path:
    return step_folders(run)[-1]


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("__*.distcp"))


def flip(path: Path, at: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def zero_page(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(bytes(4096))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def other_step(run: Path) -> None:
    """The mark of step 2 in the folder of step 4."""
    two, four = step_folders(run)
    shutil.copy(two / MANIFEST_FILE, four / MANIFEST_FILE)


def change_manifest(run: Path, **values: object) -> None:
    mark = json.loads((newest(run) / MANIFEST_FILE).read_text()) | values
    (newest(run) / MANIFEST_FILE).write_text(json.dumps(mark))


def every(run: Path, do: Callable[[Path], None]) -> None:
    for folder in step_folders(run):
        do(folder)


def leave_drafts(run: Path) -> None:
    draft = run / "checkpoints" / ".step-00000006.draft"
    draft.mkdir()
    (draft / "__0_0.distcp").write_bytes(b"half")
    newest(run).rename(run / "checkpoints" / ".step-00000004.draft")


def other_lr(run: Path) -> None:
    """A whole checkpoint of another experiment."""
    for folder in step_folders(run):
        mark = parse_manifest((folder / MANIFEST_FILE).read_bytes())
        mark.experiment["optimizer"]["lr"] = 1.0
        (folder / MANIFEST_FILE).write_text(manifest_text(mark))


def pickle_bomb(run: Path) -> None:
    """A `.metadata` that would run code, by way of a module that it may name, in a checkpoint whose checksums are right."""
    for folder in step_folders(run):
        path = folder / ".metadata"
        path.write_bytes(calls("torch.distributed.checkpoint.metadata", "os.system", f"touch {run}/exploded"))
        mark = parse_manifest((folder / MANIFEST_FILE).read_bytes())
        files = mark.files | {".metadata": WrittenFile(path.stat().st_size, checksum(path))}
        (folder / MANIFEST_FILE).write_text(manifest_text(dataclasses.replace(mark, files=files)))


def half_a_row(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"train/step": 5, "train/lo')


def dangling(run: Path) -> None:
    folder = newest(run)
    shutil.rmtree(folder)
    folder.symlink_to(run / "nowhere")


DAMAGES = (
    Damage("a shard is gone", lambda run: shards(newest(run))[0].unlink()),
    Damage("a shard is cut in half", lambda run: truncate(shards(newest(run))[0])),
    Damage("a bit of a shard is flipped", lambda run: flip(shards(newest(run))[-1], 0.5)),
    Damage("the last bit of a shard is flipped", lambda run: flip(shards(newest(run))[-1], 1.0)),
    Damage("a page of a shard is zeros", lambda run: zero_page(shards(newest(run))[0])),
    Damage(".metadata is gone", lambda run: (newest(run) / ".metadata").unlink()),
    Damage("a bit of .metadata is flipped", lambda run: flip(newest(run) / ".metadata", 0.3)),
    Damage("the mark is gone", lambda run: (newest(run) / MANIFEST_FILE).unlink()),
    Damage("the mark is empty", lambda run: (newest(run) / MANIFEST_FILE).write_text("")),
    Damage("the mark is cut in half", lambda run: truncate(newest(run) / MANIFEST_FILE)),
    Damage("a figure of the mark is changed", lambda run: change_manifest(run, tokens=1)),
    Damage("the mark is of another step", other_step),
    Damage("the mark is of a later format", lambda run: change_manifest(run, format=9), REFUSED),
    Damage("the folder is renamed", lambda run: newest(run).rename(run / "checkpoints" / "step-00000005")),
    Damage("the newest is a link to nowhere", dangling),
    Damage("drafts are left, one that was being deleted", leave_drafts),
    Damage("all checkpoints are gone", lambda run: shutil.rmtree(run / "checkpoints"), ANEW, 0),
    Damage("all shards are gone", lambda run: every(run, lambda f: shards(f)[0].unlink()), REFUSED),
    Damage("all have a flipped bit", lambda run: every(run, lambda f: flip(shards(f)[0], 0.7)), REFUSED),
    Damage("all are of another learning rate", other_lr, REFUSED),
    Damage("all would run code when read", pickle_bomb, REFUSED),
    Damage("metrics.jsonl ends in half a row", half_a_row, GOES_ON, 4),
)


def damaged(number: int, folder: Path, whole: Reference) -> Survived:
    """A run that is stopped, damaged and started again, under other plans each time."""
    folder.mkdir(parents=True)
    damage, survived = DAMAGES[number], Survived(number)
    small = [cell for cell, (size, _) in CELLS.items() if size <= 2]
    first, second, third = (small[(number + n) % len(small)] for n in (0, 2, 3))
    assert -9 in start(first, folder, Fault("step", STOPPED_AT, "kill_all", 0))
    damage.do(folder)
    before = snapshot(folder)
    codes = start(second, folder)
    survived.history = [damage.what, f"{second}: {codes}"]
    said = "".join(path.read_text() for path in folder.parent.glob(f"{folder.name}.rank*.txt"))
    if damage.then == REFUSED:
        if set(codes) - {2, -15} or "error: " not in said:
            survived.problems.append("not refused")
        if (folder / "exploded").exists():
            survived.problems.append("code of a checkpoint was run")
        if snapshot(folder) != before:
            survived.problems.append("the folder was touched")
        codes = start(third, folder, None, "resume=never")
        survived.history.append(f"{third}, resume=never: {codes}")
    if set(codes) != {0}:
        survived.problems.append("not done")
        return survived
    went_on_from = [resumption["step"] for resumption in read_resumptions(folder)]
    if went_on_from != ([damage.from_step] if damage.then == GOES_ON else []):
        survived.problems.append(f"it went on from {went_on_from}")
    survived.problems += find_problems(folder)
    compare(folder, whole, survived)
    return survived


def snapshot(run: Path) -> dict[str, bytes]:
    """What refusing must not change: the record and the checkpoints."""
    kept = [*run.glob("checkpoints/**/*"), run / "metrics.jsonl"]
    return {str(path.relative_to(run)): path.read_bytes() for path in kept if path.is_file()}
