"""What a local folder of data=hf may unpack to, held to data.max_record_bytes before the `datasets` library reads it.

That library reads a line, a row group or a compressed list whole, whatever comes out of it, and names no file in its errors.
"""

from __future__ import annotations

import dataclasses
import json
import lzma
import zlib
from contextlib import closing
from itertools import count
from pathlib import Path

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import DataConfig, DataSource
from tpresearch.data.documents import (
    MOST_PACKED,
    check_row_group,
    parquet_file,
    read_file,
    too_long,
    unreadable,
)

LINES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".text")
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip")
FIRST = 16 << 20
"""Bytes of a file that the library reads for its first record, and that a check of the first record looks at."""
DEEP = 500
"""Brackets in a line, above which it may be nested more deeply than can be read."""
AT_FAULT = (OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError)


def check_unpacked(data: DataConfig, files: list[Path], first_only: bool) -> None:
    """Refuse a record that unpacks to more than data.max_record_bytes.

    Args:
        files: of the folder; others than text and Parquet are left to the library.
        first_only: look at what is read for the first record, of the first file.

    Raises:
        ConfigError: naming the file and the line or row group.
    """
    for path in files[: 1 if first_only else None]:
        suffixes = [suffix for suffix in path.suffixes if suffix not in PACKED]
        if suffixes[-1:] == [".parquet"]:
            with closing(parquet_file(path)) as file:
                for number in range(1 if first_only else file.num_row_groups):
                    check_row_group(data, path, file, number)
        elif suffixes and suffixes[-1] in LINES:
            _check_lines(data, path, data.max_record_bytes + FIRST if first_only else None)


def _check_lines(data: DataConfig, path: Path, enough: int | None) -> None:
    """A list in JSON is one record, which may be as large as its file, or as any that someone has packed."""
    import fsspec

    number, seen, most = 0, 0, data.max_record_bytes
    try:
        with fsspec.open(str(path), "rb", compression="infer") as file:
            for number in count(1):
                line = file.readline(most + 1)
                if number == 1 and line.lstrip().startswith(b"["):
                    most = max(most, MOST_PACKED * path.stat().st_size)
                    line += file.read(most + 1 - len(line)) if path.suffix in PACKED else b""
                if len(line) > most:
                    raise too_long(f"{path}, line {number}", data)
                if line.count(b"[") + line.count(b"{") > DEEP and ".json" in path.name:
                    json.loads(line)  # where it is nested too deeply, the library's reader ends the process
                seen += len(line)
                if not line or (enough and seen > enough):
                    return
    except AT_FAULT as error:
        raise unreadable(f"{path}, line {number}", error) from None


def fault_in(data: DataConfig, files: list[Path]) -> ConfigError | None:
    """What is wrong with a file that the library could not read, told by our own readers, with the line or row."""
    for path in files:
        suffixes = [suffix for suffix in path.suffixes if suffix not in PACKED]
        source = {".jsonl": DataSource.jsonl, ".ndjson": DataSource.jsonl, ".parquet": DataSource.parquet}
        if suffixes and (own := source.get(suffixes[-1])) and path.suffix in (suffixes[-1], ".gz"):
            try:
                for _ in read_file(dataclasses.replace(data, source=own), path.name, path):
                    pass
            except ConfigError as error:
                return error
    return None
