"""Cached folders: built once per host, atomically, and rebuilt when found damaged."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from tpresearch.config.errors import ConfigError
from tpresearch.config.locks import lock

log = logging.getLogger(__name__)

Meta = dict[str, Any]
META_FILE = "meta.json"
LOG_WAIT_AFTER_S = 4
"""Seconds to wait for a lock before logging it."""
HEAD_START_S, POLL_S = 5, 0.1
"""How long others wait for the leading process to start, where processes start together."""
SAMPLES, SAMPLE_BYTES = 64, 1 << 20


class DamagedCache(Exception):
    """A cached folder whose content has changed; the message names the file."""


def build_once(
    folder: Path,
    build: Callable[[Path], Meta],
    check: Callable[[], None] = lambda: None,
    is_leader: bool = True,
) -> Meta:
    """The meta.json of `folder`, which `build` fills where it is missing or damaged.

    May be called by any number of processes at once: one builds, under a file lock, and the others wait.
    `build` writes into a draft folder, which is renamed when it is complete, and returns the content of meta.json.

    Args:
        check: called while another process is waited for; what it raises ends the wait.
        is_leader: whether this process shows progress; the others let it build, if it starts soon.

    Raises:
        ConfigError: naming data.cache_dir, where the disk is full or has no locks, or files may not grow so large or are another user's.
    """
    try:
        if (meta := _read_usable(folder)) is None:
            folder.parent.mkdir(parents=True, exist_ok=True)
            if not is_leader:
                _wait_for_leader(folder, check)
            with _locked(folder, check):
                meta = _read_usable(folder, remove_damaged=True) or _build(folder, build)
        return meta
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            why, legal = "no space left", "a disk with room"
        elif error.errno == errno.EFBIG:
            why, legal = "its files are larger than this process may write", "a larger ulimit -f"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            why = f"{error.filename} may not be used by user {os.getuid()}"
            legal = "a folder that this user can write"
        elif error.errno == errno.ENOLCK:  # as of NFS, where its lock service does not run
            why, legal = "its disk gives no locks, which the ranks of a host need", "a folder on another disk"
        else:
            raise
        raise ConfigError("data.cache_dir", folder.parent.parent, why, legal) from error


def _wait_for_leader(folder: Path, check: Callable[[], None]) -> None:
    until = time.monotonic() + HEAD_START_S
    while not _lock_path(folder).exists() and time.monotonic() < until:
        check()
        time.sleep(POLL_S)


@contextmanager
def _locked(folder: Path, check: Callable[[], None]) -> Iterator[None]:
    """Hold the folder's lock; a process that waits for it logs which one holds it."""
    path = _lock_path(folder)
    logged_at = time.monotonic() + LOG_WAIT_AFTER_S
    with path.open("a") as file:
        check()
        while not lock(file):
            if time.monotonic() >= logged_at:
                builders = [path.name.split(".")[-2] for path in folder.parent.glob(f".{folder.name}.*.tmp")]
                who = f"process {builders[0]}" if len(builders) == 1 else "another process"
                log.info("waiting for %s, which %s holds: it prepares the same data", path, who)
                logged_at = math.inf
            time.sleep(POLL_S)
            check()
        yield


def _read_usable(folder: Path, remove_damaged: bool = False) -> Meta | None:
    try:
        return read_intact(folder)
    except DamagedCache as damage:
        if remove_damaged:
            log.warning("%s is damaged (%s): building it again", folder, damage)
            shutil.rmtree(folder)
        return None


def _build(folder: Path, build: Callable[[Path], Meta]) -> Meta:
    _remove_leftovers(folder)
    draft = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    draft.mkdir()
    try:
        meta = _write_meta(draft, build(draft))
        draft.rename(folder)
        return meta
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def read_intact(folder: Path) -> Meta | None:
    """The folder's meta.json; None if there is no such folder.

    Compares every file's size, and a CRC-32 of 64 samples of a megabyte, which is all of a file up to 64 MiB:
    under 0.1 s whatever the size of the corpus. A flipped bit between the samples of a larger file is not
    detected.

    Raises:
        DamagedCache: naming the first file that is missing or differs.
    """
    if not folder.is_dir():
        return None
    try:
        meta: Meta = json.loads((folder / META_FILE).read_bytes())
        sealed = meta.pop("checksum")
        files = meta["files"]
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCache(f"{META_FILE}: {type(error).__name__}: {error}") from None
    if sealed != _crc_of_meta(meta):
        raise DamagedCache(f"{META_FILE}: its checksum differs")
    for name, expected in files.items():
        path = folder / name
        try:
            size, crc = path.stat().st_size, checksum(path)
        except FileNotFoundError:  # before, or now, by another process that has found damage
            raise DamagedCache(f"{name}: missing") from None
        if size != expected["bytes"]:
            raise DamagedCache(f"{name}: {size} bytes instead of {expected['bytes']}")
        if crc != expected["crc32"]:
            raise DamagedCache(f"{name}: its checksum differs")
    return meta


def checksum(path: Path) -> int:
    """CRC-32 of 64 evenly spaced megabytes of a file, of all of it up to 64 MiB."""
    size, crc = path.stat().st_size, 0
    starts: Sequence[int] = range(0, size, SAMPLE_BYTES)
    if len(starts) > SAMPLES:
        starts = [sample * (size - SAMPLE_BYTES) // (SAMPLES - 1) for sample in range(SAMPLES)]
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            crc = zlib.crc32(file.read(SAMPLE_BYTES), crc)
    return crc


def _write_meta(folder: Path, meta: Meta) -> Meta:
    """Write meta.json: what was built, the size and checksum of each file, and its own checksum."""
    files = sorted(folder.iterdir())
    sizes = {path.name: {"bytes": path.stat().st_size, "crc32": checksum(path)} for path in files}
    meta = {**meta, "files": sizes}
    sealed = json.dumps({**meta, "checksum": _crc_of_meta(meta)}, indent=2)
    (folder / META_FILE).write_text(sealed + "\n")
    return meta


def _crc_of_meta(meta: Meta) -> int:
    return zlib.crc32(json.dumps(meta, sort_keys=True).encode())


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _remove_leftovers(folder: Path) -> None:
    """Delete this user's leftovers of killed processes next to `folder`, whose lock we hold."""
    for leftover in folder.parent.glob(".*.tmp"):
        owner = folder.with_name(leftover.name[1:].rsplit(".", 2)[0])
        try:
            with nullcontext() if owner == folder else _lock_path(owner).open("a") as file:
                if file is None or lock(file):  # not still being built
                    shutil.rmtree(leftover, ignore_errors=True)
        except PermissionError:  # another user's
            continue
