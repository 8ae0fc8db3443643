"""Files that the `datasets` library reads: checked before, so that no record unpacks to more than data.max_record_bytes, and
read by our own readers where it has failed, whose error names the file, and the line or row."""

from __future__ import annotations

import dataclasses
import json
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import DataConfig, DataSource
from tpresearch.data.documents import (
    COMPRESSED_SUFFIXES,
    MAX_COMPRESSION_RATIO,
    READ_ERRORS,
    check_row_group,
    parquet_file,
    read_file,
    record_too_long,
    unreadable,
)

TEXT_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text")
FIRST_RECORD_BYTES = 16 << 20
"""Bytes of a file that the library reads for its first record, and that a check of the first record looks at."""
MAX_BRACKETS = 500
"""Brackets in a line above which it may be nested too deeply to be read."""


def check_unpacked_sizes(data: DataConfig, files: list[Path], first_only: bool) -> None:
    """Refuse a record that unpacks to more than data.max_record_bytes.

    Args:
        files: of the folder; files other than text and Parquet are left to the library.
        first_only: check only what is read for the first record of the first file.

    Raises:
        ConfigError: naming the file and the line or row group.
    """
    for path in files[: 1 if first_only else None]:
        suffix = _unpacked_suffix(path)
        if suffix == ".parquet":
            with closing(parquet_file(path)) as file:
                for number in range(1 if first_only else file.num_row_groups):
                    check_row_group(data, path, file, number)
        elif suffix in TEXT_SUFFIXES:
            _check_lines(data, path, data.max_record_bytes + FIRST_RECORD_BYTES if first_only else None)


def _unpacked_suffix(path: Path) -> str:
    """`.jsonl` of `a.jsonl.gz`."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in COMPRESSED_SUFFIXES]
    return suffixes[-1] if suffixes else ""


def _check_lines(data: DataConfig, path: Path, enough: int | None) -> None:
    """Check each line of a text file. A JSON list is one record, which may be as large as its file unpacks to."""
    import fsspec

    number, seen, most = 0, 0, data.max_record_bytes
    try:
        opened: Any = fsspec.open(str(path), "rb", compression="infer")
        with opened as file:
            for number in count(1):
                line = file.readline(most + 1)
                if number == 1 and line.lstrip().startswith(b"["):
                    most = max(most, MAX_COMPRESSION_RATIO * path.stat().st_size)
                    line += file.read(most + 1 - len(line)) if path.suffix in COMPRESSED_SUFFIXES else b""
                if len(line) > most:
                    raise record_too_long(f"{path}, line {number}", data)
                if line.count(b"[") + line.count(b"{") > MAX_BRACKETS and ".json" in path.name:
                    json.loads(line)  # where it is nested too deeply, the library's reader ends the process
                seen += len(line)
                if not line or (enough and seen > enough):
                    return
    except READ_ERRORS as error:
        raise unreadable(f"{path}, line {number}", error) from None


def find_unreadable(data: DataConfig, files: list[Path]) -> ConfigError | None:
    """The first error that our own readers find in files that the library could not read, with its line or row."""
    sources = {".jsonl": DataSource.jsonl, ".ndjson": DataSource.jsonl, ".parquet": DataSource.parquet}
    for path in files:
        suffix = _unpacked_suffix(path)
        if (own := sources.get(suffix)) and path.suffix in (suffix, ".gz"):
            try:
                for _ in read_file(dataclasses.replace(data, source=own), path.name, path):
                    pass
            except ConfigError as error:
                return error
    return None
