"""Checkpoints on disk, each complete or absent. Nothing here needs torch.

    checkpoints/.step-00000100.draft/    while it is written, and while it is deleted
    checkpoints/step-00000100/           once every file is on disk, with checkpoint.json, which describes them
    checkpoints/step-00000100.cut/       set aside, since the run resumed from an earlier step

A rename within a folder is atomic, and what was synced before it survives a crash: this is why a checkpoint is complete or absent.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tpresearch.checkpoint.faults import fault_point

CHECKPOINTS_FOLDER, MANIFEST_FILE = "checkpoints", "checkpoint.json"
STEP_FOLDER = re.compile(r"step-(\d{8,})")
FORMAT_VERSION = 1
"""Version of the format of checkpoints. A reader refuses a later one."""


class BrokenCheckpoint(Exception):
    """A folder is not a complete checkpoint; the message says why, in one line."""


class NewerFormat(BrokenCheckpoint):
    """Written by a newer version of this package: it may be complete."""


class WrittenFile(NamedTuple):
    bytes: int
    crc32: int


@dataclass(frozen=True)
class Manifest:
    """checkpoint.json: the description of a checkpoint, written last."""

    step: int
    """Optimizer steps done."""
    tokens: int
    """Tokens trained on since the run began."""
    loss: float | None
    """train/loss of its last step."""
    experiment: dict[str, Any]
    """The part of the config that determines the result: see `config.comparable`; and `initial_weights`, a hash of init_from's."""
    steps: int
    """The step at which the run was to end."""
    corpus_hash: str
    tokenizer_hash: str
    rows: int
    """Rows of the train split."""
    plan: str
    """The option of the parallel group."""
    mesh: dict[str, int]
    """Ranks along each axis with more than one."""
    world_size: int
    torch: str
    """Its version."""
    files: dict[str, WrittenFile] = dataclasses.field(default_factory=dict)
    format: int = FORMAT_VERSION


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint: its manifest (checkpoint.json), and files of the stated sizes. `find_damage` checks their contents."""

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.manifest.files.values())


def folder_of(run: Path, step: int) -> Path:
    return run / CHECKPOINTS_FOLDER / f"step-{step:08d}"


def draft_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.draft")


def read_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a folder, judging by its manifest and the sizes of its files.

    Raises:
        BrokenCheckpoint: if it is not complete.
    """
    named = STEP_FOLDER.fullmatch(folder.name)
    if not named:
        raise BrokenCheckpoint("its folder is not called step-<number>")
    try:
        manifest = parse_manifest((folder / MANIFEST_FILE).read_bytes())
        if manifest.step != int(named[1]):
            raise BrokenCheckpoint(f"its {MANIFEST_FILE} is of step {manifest.step}")
        for name in manifest.files:
            if Path(name).name != name:
                raise BrokenCheckpoint(f"its {MANIFEST_FILE} names {name}")
        check_sizes(folder, manifest.files)
    except OSError as error:
        raise BrokenCheckpoint(f"{Path(error.filename or MANIFEST_FILE).name}: {error.strerror}") from None
    return Checkpoint(folder, manifest)


def check_sizes(folder: Path, files: Mapping[str, WrittenFile]) -> None:
    """Compare the sizes of the files of a checkpoint, or of its draft, with what was written.

    Raises:
        BrokenCheckpoint: for the first that differs.
        OSError: for the first that is not there.
    """
    for name, written in files.items():
        size = (folder / name).stat().st_size
        if size != written.bytes:
            raise BrokenCheckpoint(f"{name} has {size:,} bytes of {written.bytes:,}")


def complete_checkpoints(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run, oldest first."""
    found = []
    for folder in step_folders(run):
        try:
            found.append(read_checkpoint(folder))
        except BrokenCheckpoint:
            continue
    return found


def step_folders(run: Path) -> list[Path]:
    """Every folder named like a checkpoint, complete or not, by step.

    Raises:
        OSError: if they cannot be listed.
    """
    try:
        folders = [path for path in (run / CHECKPOINTS_FOLDER).iterdir() if STEP_FOLDER.fullmatch(path.name)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")))


def find_damage(folder: Path, files: Iterable[tuple[str, WrittenFile]]) -> str | None:
    """Read files completely; return what is wrong with the first that is damaged, in one line, or None."""
    for name, written in files:
        try:
            if checksum(folder / name) != written.crc32:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def manifest_text(manifest: Manifest) -> str:
    """checkpoint.json, with a checksum of itself."""
    body = dataclasses.asdict(manifest)
    return json.dumps({"crc32": _crc_of(body), **body}, indent=1) + "\n"


def parse_manifest(text: bytes) -> Manifest:
    """The manifest that `manifest_text` has written, from the bytes of its file.

    Raises:
        BrokenCheckpoint: if it is invalid, was changed, or is of a later format.
    """
    try:
        body = json.loads(text)
        if (found := body["format"]) > FORMAT_VERSION:
            raise NewerFormat(f"its format is {found}, and this version reads up to {FORMAT_VERSION}")
        if body.pop("crc32") != _crc_of(body):
            raise BrokenCheckpoint(f"{MANIFEST_FILE} is not as it was written")
        files = {name: WrittenFile(*file) for name, file in body.pop("files").items()}
        return Manifest(**body, files=files)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BrokenCheckpoint(f"{MANIFEST_FILE} cannot be read") from None


def _crc_of(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def make_draft(draft: Path) -> None:
    """Make an empty draft folder."""
    _remove(draft)
    draft.mkdir(parents=True)


def sync_and_checksum(path: Path) -> WrittenFile:
    """Sync a written file; returns its size and checksum, which is computed while the disk works."""
    with ThreadPoolExecutor(1) as beside:
        syncing = beside.submit(sync, path)
        found = WrittenFile(path.stat().st_size, checksum(path))
        syncing.result()
    return found


def commit(folder: Path, manifest: Manifest) -> None:
    """Turn the draft, whose files are synced, into the checkpoint."""
    draft = draft_of(folder)
    with (draft / MANIFEST_FILE).open("w", encoding="utf-8") as file:
        file.write(manifest_text(manifest))
    sync(draft / MANIFEST_FILE)
    sync(draft)
    fault_point("marked")
    draft.rename(folder)
    fault_point("renamed")
    sync(folder.parent)


def prune(run: Path, keep: int, keep_every: int | None) -> None:
    """Delete complete checkpoints, except the newest `keep` and those of steps to keep permanently."""
    for old in complete_checkpoints(run)[:-keep]:
        if keep_every is None or old.step % keep_every:
            draft = draft_of(old.folder)
            old.folder.rename(draft)  # so that a half-deleted one is never taken for a complete one
            fault_point("pruning")
            _remove(draft)


def clear_drafts(run: Path) -> None:
    """Remove the leftovers of processes that died while writing or deleting."""
    for draft in (run / CHECKPOINTS_FOLDER).glob(".step-*.draft"):
        _remove(draft)


def set_aside_after(run: Path, step: int) -> list[Path]:
    """Set aside the folders of later steps, complete or not; returns their new paths."""
    later = [folder for folder in step_folders(run) if int(folder.name.removeprefix("step-")) > step]
    return [folder.rename(_cut_name(folder)) for folder in later]


def _cut_name(folder: Path) -> Path:
    endings = itertools.chain(["cut"], (f"cut-{nth}" for nth in itertools.count(2)))
    paths = (folder.with_name(f"{folder.name}.{ending}") for ending in endings)
    return next(path for path in paths if not os.path.lexists(path))


def _remove(folder: Path) -> None:
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def checksum(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
