"""How many rows the client of W&B has on disk for `wandb sync`: what it was handed just before it was killed may not be.

Its files are LevelDB's log format (github.com/google/leveldb, doc/log_format.md) behind a header of 7 bytes: records of
protobuf, in parts that never cross a block. Checked on wandb 0.31.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

BLOCK, HEADER = 1 << 15, 7
PART = struct.Struct("<IHB")
"""Of each part: checksum, length, kind."""
WHOLE, LAST = 1, 4
"""Kinds of a part that end a record."""


def rows_on_disk(folders: list[Path]) -> int | None:
    """Rows of history in the files of these runs (`wandb/offline-run-*`); None where this client has others than we know."""
    try:
        protobuf: Any = import_module("wandb.proto.wandb_internal_pb2")
        files = sorted(path for folder in folders for path in folder.glob("run-*.wandb"))
        kinds = (
            protobuf.Record.FromString(record) for path in files for record in records(path.read_bytes())
        )
        return sum(record.WhichOneof("record_type") == "history" for record in kinds)
    except Exception:
        return None


def records(log: bytes) -> Iterator[bytes]:
    """Each record that was written whole."""
    at, parts = HEADER, b""
    while True:
        if BLOCK - at % BLOCK < PART.size:  # too little of this block for another
            at += BLOCK - at % BLOCK
        if at + PART.size > len(log):
            return
        _, length, kind = PART.unpack_from(log, at)
        at += PART.size
        if at + length > len(log):
            return
        parts += log[at : at + length]
        at += length
        if kind in (WHOLE, LAST):
            yield parts
            parts = b""
