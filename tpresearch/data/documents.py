"""The documents of a file: text, JSON lines, Parquet; an error names the file, and the line or row.

The `datasets` library also reads these formats, but its errors do not say in which file, it reads a line, a row group or a compressed
list whole, whatever its unpacked size, takes a missing field for an empty one and a date for no text, turns CRLF into LF, and
needs 2 (Parquet) to 3 times (JSON lines) the processor time.
"""

from __future__ import annotations

import codecs
import dataclasses
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tpresearch.config.errors import ConfigError, first_line
from tpresearch.config.near_names import nearest
from tpresearch.config.schema import DataConfig, DataSource

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

Parts = Iterable[str]
"""A text in parts, cut anywhere."""
PART_BYTES = 8 << 20
"""Bytes of a text file that are in memory at a time."""
PARQUET_BATCH_ROWS = 64
"""Rows of Parquet read at once: repeated text takes little room in a file, but all of it in memory."""
TO_FILL_IN = {"data.text_field": "VALUE"}
MAX_COMPRESSION_RATIO = 100
"""Maximum ratio of unpacked to packed bytes: real text stays far below it."""
PACKED = re.compile(r"(\.(?:gz|bz2|xz|zst|lz4|zip))(, line \d+)?$")
"""The end of a compressed file's name, and of a place in it."""
READ_ERRORS = (OSError, EOFError, ValueError, RuntimeError, zlib.error, lzma.LZMAError)


class Document(NamedTuple):
    name: str
    """A file's relative path, or `<relative path>:<index of the line or row, from 0>`."""
    parts: Parts
    """Its text, which can be read again and again."""


@dataclasses.dataclass(frozen=True)
class _TextFile:
    """The text of a file, which memory need not hold, in parts."""

    path: Path
    errors: str
    """What becomes of bytes that are not UTF-8: `strict` or `replace`, as of `bytes.decode`."""

    def __iter__(self) -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8-sig")(self.errors)
        seen, is_over = 0, False
        try:
            with self.path.open("rb") as file:
                while not is_over:
                    block = file.read(PART_BYTES)
                    seen, is_over = seen + len(block), len(block) < PART_BYTES
                    yield decoder.decode(block, is_over)
        except UnicodeDecodeError as error:
            raise _unreadable(self.path, error, seen - len(error.object)) from None
        except OSError as error:
            raise _unreadable(self.path, error) from None


def read_file(data: DataConfig, name: str, path: Path) -> Iterator[Document]:
    """The documents of one file; those without text are skipped.

    Raises:
        ConfigError: naming the file and the line or row, for what cannot be read or is not text.
    """
    if data.source is DataSource.jsonl:
        yield from documents_of(_json_lines(data, path), data.text_field, f"{name}:", f"{path}, line")
    elif data.source is DataSource.parquet:
        yield from documents_of(_parquet_rows(data, path), data.text_field, f"{name}:", f"{path}, row")
    else:  # some of Python's own sources are in older encodings
        parts = _TextFile(path, "strict" if data.source is DataSource.text else "replace")
        if any(parts):
            yield Document(name, parts)


def documents_of(records: Iterable[Any], text_field: str, prefix: str, where: str) -> Iterator[Document]:
    """The text of each record, named `<prefix><index>`, index from 0; records without text are left out.

    Args:
        records: dicts, unless a record is wrong.
        where: names record i in errors, as `<where> i`, from 1.

    Raises:
        ConfigError: naming the first record that cannot be read or has no text in that field.
    """
    index = -1
    try:
        for index, record in enumerate(records):
            if text := _text_of(record, text_field, f"{where} {index + 1}"):
                yield Document(f"{prefix}{index}", (text,))
    except READ_ERRORS as error:
        raise _unreadable(f"{where} {index + 2}", error) from None


def _text_of(record: Any, text_field: str, where: str) -> str:
    if not isinstance(record, dict):
        kind = type(record).__name__
        raise ConfigError("data.path", where, f"a JSON {kind}", "one JSON object per line")
    if text_field not in record:
        raise missing_field(text_field, list(record), where)
    text = record[text_field]
    if text is None:
        return ""
    if not isinstance(text, str):
        why = f"holds {type(text).__name__}, not text, in {where}"
        raise ConfigError("data.text_field", text_field, why, "a field of strings", TO_FILL_IN)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"{ord(text[error.start]):#06x}"
            why = f"not Unicode text: character {error.start + 1} is {half}, half of a surrogate pair"
            raise ConfigError("data.path", where, why, "text that has a UTF-8 encoding") from None
    return text


def missing_field(text_field: str, fields: list[str], where: str) -> ConfigError:
    """The refusal of a record that lacks the text field, with the nearest one it has as the remedy."""
    near = nearest(text_field, fields)
    fix = {"data.text_field": near[0]} if near else {}
    legal = f"one of {', '.join(near) or 'none'}"
    return ConfigError("data.text_field", text_field, f"no such field in {where}", legal, fix)


def _record_too_long(where: str, data: DataConfig) -> ConfigError:
    why = f"longer than data.max_record_bytes={data.max_record_bytes}"
    fix = {"data.max_record_bytes": 16 * data.max_record_bytes}
    return ConfigError("data.path", where, why, "shorter records, or a larger bound", fix)


def _unreadable(where: object, error: Exception, bytes_before: int = 0) -> ConfigError:
    """The refusal of what cannot be read.

    Args:
        bytes_before: of the file, before those that could not be decoded.
    """
    legal = "UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        why, legal = f"not JSON: {error}", "one JSON object per line"
    elif isinstance(error, RecursionError):
        why, legal = "JSON nested too deep to be read", "one JSON object per line"
    elif isinstance(error, UnicodeDecodeError) and (packed := PACKED.search(str(where))):
        why, legal = f"compressed as {packed[1]}", "an unpacked file, or a .gz with data=jsonl"
    elif isinstance(error, UnicodeDecodeError):
        why = f"not UTF-8 text: byte {bytes_before + error.start} is {error.object[error.start]:#04x}"
    else:
        why = f"cannot be read: {getattr(error, 'strerror', None) or first_line(error)}"
        legal = "a readable, complete file"
    return ConfigError("data.path", where, why, legal)


def _json_lines(data: DataConfig, path: Path) -> Iterator[Any]:
    """The value of each line; a blank one is a record without text."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number in count(1):
            if not (line := lines.readline(data.max_record_bytes + 1)):
                return
            if len(line) > data.max_record_bytes:
                raise _record_too_long(f"{path}, line {number}", data)
            yield {data.text_field: None} if line.isspace() else json.loads(line)


def _parquet_rows(data: DataConfig, path: Path) -> Iterator[dict[str, str | None]]:
    import pyarrow as pa

    text_field = data.text_field
    with _parquet_file(path) as file:
        if text_field not in file.schema_arrow.names:
            raise missing_field(text_field, file.schema_arrow.names, str(path))
        kind = file.schema_arrow.field(text_field).type
        values = kind.value_type if pa.types.is_dictionary(kind) else kind
        of_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
        if not any(is_one(values) for is_one in of_text):
            why = f"holds {kind}, not text, in {path}"
            raise ConfigError("data.text_field", text_field, why, "a column of strings", TO_FILL_IN)
        for number in range(file.num_row_groups):
            _check_row_group(data, path, file, number)
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, row_groups=[number], columns=[text_field]):
                yield from batch.to_pylist()


def _parquet_file(path: Path) -> ParquetFile:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(path, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        why = f"not Parquet: {first_line(error)}"
        raise ConfigError("data.path", path, why, "Parquet files (*.parquet)") from None


def _check_row_group(data: DataConfig, path: Path, file: ParquetFile, number: int) -> None:
    """Refuse a row group whose unpacked size is not plausible for text."""
    group = file.metadata.row_group(number)
    for column in (group.column(index) for index in range(group.num_columns)):
        usual = max(data.max_record_bytes, MAX_COMPRESSION_RATIO * column.total_compressed_size)
        if column.path_in_schema == data.text_field and column.total_uncompressed_size > usual:
            raise _record_too_long(f"{path}, row group {number}", data)
