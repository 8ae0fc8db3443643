"""A folder is a checkpoint when its mark, its name and its files say so; nothing else on the disk is taken for one."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from support.made_checkpoints import save

from tpresearch.checkpoint import disk
from tpresearch.checkpoint.disk import BrokenCheckpoint, NewerFormat, folder_of, read_checkpoint


def test_a_committed_folder_is_whole_and_says_what_it_is_of(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    found = read_checkpoint(folder)
    assert (found.step, found.bytes, found.manifest.plan, found.manifest.mesh) == (7, 200, "tp", {"tp": 2})
    assert [path.name for path in folder.parent.iterdir()] == ["step-00000007"]
    assert disk.find_damage(folder, found.manifest.files.items()) is None
    written = found.manifest.files[".metadata"]
    assert written == (100, zlib.crc32((folder / ".metadata").read_bytes())), "as any other program would say"
    assert disk.complete_checkpoints(tmp_path / "of another run") == []


def test_all_of_it_is_on_disk_before_it_is_a_checkpoint(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or a crash of the machine could leave a checkpoint that lacks something."""
    on_disk: list[int] = []
    rename, fsync, opened = Path.rename, os.fsync, len(os.listdir("/proc/self/fd"))

    def inode(path: Path) -> int:
        return path.stat().st_ino

    def synced(number: int) -> None:
        fsync(number)
        on_disk.append(os.fstat(number).st_ino)

    def renamed(draft: Path, folder: Path) -> Path:
        assert {inode(path) for path in (draft, *draft.iterdir())} == set(on_disk)
        assert on_disk[-1] == inode(draft), "with the entries of all its files"
        return rename(draft, folder)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    folder = save(tmp_path, 7)
    assert len(on_disk) == 5
    assert on_disk[-1] == inode(folder.parent), "where it got its name"
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="Input/output error"):
        disk.sync_and_checksum(folder / ".metadata")
    assert len(os.listdir("/proc/self/fd")) == opened


def rewrite(folder: Path, **values: object) -> None:
    mark = json.loads((folder / disk.MANIFEST_FILE).read_text()) | values
    (folder / disk.MANIFEST_FILE).write_text(json.dumps(mark))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no mark": (lambda f: (f / disk.MANIFEST_FILE).unlink(), "checkpoint.json: No such file or directory"),
    "half a mark": (lambda f: os.truncate(f / disk.MANIFEST_FILE, 90), "checkpoint.json cannot be read"),
    "a list for a mark": (
        lambda f: (f / disk.MANIFEST_FILE).write_text("[1]"),
        "checkpoint.json cannot be read",
    ),
    "a byte that is no text": (
        lambda f: (f / disk.MANIFEST_FILE).write_bytes(b"\xff"),
        "checkpoint.json cannot be read",
    ),
    "another figure": (lambda f: rewrite(f, loss=1.0), "checkpoint.json is not as it was written"),
    "another key": (lambda f: rewrite(f, more=1), "checkpoint.json is not as it was written"),
    "no file": (lambda f: (f / ".metadata").unlink(), ".metadata: No such file or directory"),
    "a short file": (lambda f: os.truncate(f / "__0_0.distcp", 99), "__0_0.distcp has 99 bytes of 100"),
    "a file elsewhere": (lambda f: _elsewhere(f), r"names \.\./x"),
}


def _elsewhere(folder: Path) -> None:
    mark = read_checkpoint(folder).manifest
    files = mark.files | {"../x": disk.WrittenFile(0, 0)}
    (folder / disk.MANIFEST_FILE).write_text(disk.manifest_text(dataclasses.replace(mark, files=files)))


@pytest.mark.parametrize("how", BROKEN)
def test_a_folder_that_is_not_whole_is_no_checkpoint(tmp_path: Path, how: str) -> None:
    do, said = BROKEN[how]
    folder = save(tmp_path, 7)
    do(folder)
    with pytest.raises(BrokenCheckpoint, match=said):
        read_checkpoint(folder)
    assert disk.complete_checkpoints(tmp_path) == []


def test_a_disk_that_cannot_be_read_is_named_by_its_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose error names no file."""
    folder = save(tmp_path, 7)
    monkeypatch.setattr(Path, "read_bytes", Mock(side_effect=OSError(5, "Input/output error")))
    with pytest.raises(BrokenCheckpoint, match=r"^checkpoint.json: Input/output error$"):
        read_checkpoint(folder)


def test_a_name_is_the_step(tmp_path: Path) -> None:
    moved = save(tmp_path, 7).rename(folder_of(tmp_path, 8))
    with pytest.raises(BrokenCheckpoint, match="is of step 7"):
        read_checkpoint(moved)
    with pytest.raises(BrokenCheckpoint, match="is not called step-"):
        read_checkpoint(moved.rename(moved.with_name("best")))


def test_a_later_format_is_told_from_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    rewrite(folder, format=2)
    with pytest.raises(NewerFormat, match="reads up to 1"):
        read_checkpoint(folder)


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    folder = save(tmp_path, 7)
    file = read_checkpoint(folder).manifest.files[".metadata"]
    data = bytearray((folder / ".metadata").read_bytes())
    data[50] ^= 4
    (folder / ".metadata").write_bytes(data)
    assert disk.find_damage(folder, [(".metadata", file)]) == ".metadata is not as it was written"
    (folder / ".metadata").unlink()
    assert disk.find_damage(folder, [(".metadata", file)]) == ".metadata: No such file or directory"


def test_the_newest_and_milestones_stay(tmp_path: Path) -> None:
    for step in range(10, 70, 10):
        save(tmp_path, step)
    disk.prune(tmp_path, keep=2, keep_every=20)
    assert [c.step for c in disk.complete_checkpoints(tmp_path)] == [20, 40, 50, 60]
    disk.prune(tmp_path, keep=1, keep_every=None)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000060"]
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    disk.prune(tmp_path, keep=1, keep_every=None)
    assert [c.step for c in disk.complete_checkpoints(tmp_path)] == [100_000_000], "by number, not by name"


def test_a_broken_folder_does_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(tmp_path, step)
    (folder_of(tmp_path, 4) / ".metadata").unlink()
    disk.prune(tmp_path, keep=2, keep_every=None)
    assert [c.step for c in disk.complete_checkpoints(tmp_path)] == [2, 3]


def test_later_steps_are_set_aside_and_drafts_removed(tmp_path: Path) -> None:
    for _ in range(2):  # the second time beside what was set aside the first
        for step in (1, 2, 3):
            if not folder_of(tmp_path, step).exists():
                save(tmp_path, step)
        disk.set_aside_after(tmp_path, 2)
    draft, elsewhere = disk.draft_of(folder_of(tmp_path, 9)), folder_of(tmp_path, 1)
    disk.make_draft(draft)
    (draft / "half").touch()
    disk.make_draft(draft)
    assert not any(draft.iterdir()), "of a process that died"
    disk.draft_of(folder_of(tmp_path, 8)).symlink_to(elsewhere)
    disk.clear_drafts(tmp_path)
    assert read_checkpoint(elsewhere).step == 1
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002", "step-00000003.cut", "step-00000003.cut-2"]
