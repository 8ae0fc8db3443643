"""What W&B's client leaves on disk: a folder per process, with a file of records for `wandb sync`."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

BLOCK_BYTES, FILE_HEADER = 1 << 15, b":W&B\xe1\xbe\0"
PART_HEADER = struct.Struct("<IHB")
"""Header of each part: checksum, length, kind."""
FULL, LAST = 1, 4
"""Kinds of a part that end a record."""


def parts_of(folders: Path, kind: str, run_id: str) -> list[Path]:
    """The client's folders for a run, one per process in order of time; of those of one second all but the first end in a number."""
    name = re.compile(rf"{kind}-\d+_\d+-{re.escape(run_id)}(-\d+)?")
    found = folders.iterdir() if folders.is_dir() else ()
    return sorted((path for path in found if name.fullmatch(path.name)), key=lambda path: path.name)


def rows_on_disk(folders: list[Path]) -> int | None:
    """Rows of history that the client has on disk for `wandb sync` in these folders (`wandb/offline-run-*`): rows logged
    just before it was killed may be missing. None if this version of the client writes other files.
    """
    try:
        protobuf: Any = import_module("wandb.proto.wandb_internal_pb2")
        files = sorted(path for folder in folders for path in folder.glob("run-*.wandb"))
        records = (record for path in files for record, _ in read_records(path.read_bytes()))
        kinds = (protobuf.Record.FromString(record).WhichOneof("record_type") for record in records)
        return sum(kind == "history" for kind in kinds)
    except Exception:
        return None


def cut_half_record(path: Path) -> None:
    """Cut off what a client left after the last complete record of its file when it was killed, or the disk was full:
    `wandb sync` ends there, and sends none of the folders that it was to send after that one."""
    with suppress(OSError):
        log = path.read_bytes()
        if log.startswith(FILE_HEADER):
            *_, end = (len(FILE_HEADER), *(end for _, end in read_records(log)))
            os.truncate(path, end)


def read_records(log: bytes) -> Iterator[tuple[bytes, int]]:
    """Each complete record in a file of the client, and the byte at which it ends.

    LevelDB's log format (github.com/google/leveldb, doc/log_format.md) behind a header of 7 bytes: records of protobuf, in
    parts that never cross a block. Checked on wandb 0.31.
    """
    at, parts = len(FILE_HEADER), b""
    while True:
        if (left := BLOCK_BYTES - at % BLOCK_BYTES) < PART_HEADER.size:
            at += left  # too little of this block for another
        if at + PART_HEADER.size > len(log):
            return
        _, length, kind = PART_HEADER.unpack_from(log, at)
        start, at = at + PART_HEADER.size, at + PART_HEADER.size + length
        if at > len(log):
            return
        parts += log[start:at]
        if kind in (FULL, LAST):
            yield parts, at
            parts = b""
