"""From one file to its documents: plain text, Python source, JSON lines, Parquet."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tpresearch.config.errors import ConfigError, nearest
from tpresearch.config.schema import DataSource


class Document(NamedTuple):
    name: str
    """A file's relative path, or `<relative path>:<index of the line or row, from 0>`."""
    text: str


Reader = Callable[[str, Path, str], Iterator[Document]]


def read_text(name: str, path: Path, text_field: str) -> Iterator[Document]:
    """The file as one document.

    Raises:
        ConfigError: for a file that is not UTF-8.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            "data.path",
            path,
            f"not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}",
            "UTF-8 text",
        ) from None
    if text:
        yield Document(name, text)


def read_python(name: str, path: Path, text_field: str) -> Iterator[Document]:
    """The source file as one document; the few that are not UTF-8 get replacement characters."""
    text = path.read_bytes().decode(errors="replace")
    if text:
        yield Document(name, text)


def read_jsonl(name: str, path: Path, text_field: str) -> Iterator[Document]:
    """A document a line, from `text_field` of its object. Blank lines and empty texts are skipped.

    Raises:
        ConfigError: for a line that is not a JSON object, or has no text in that field.
    """
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as lines:
        for index, line in enumerate(lines):
            if line.isspace():
                continue
            where = f"{path}, line {index + 1}"
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ConfigError(
                    "data.path", where, f"not JSON: {error}", "one JSON object a line"
                ) from None
            if not isinstance(record, dict):
                raise ConfigError(
                    "data.path", where, f"a JSON {type(record).__name__}", "one JSON object a line"
                )
            if text := text_of(record, text_field, where):
                yield Document(f"{name}:{index}", text)


def text_of(record: dict[str, Any], text_field: str, where: str) -> str:
    """The text of a record; null counts as empty.

    Raises:
        ConfigError: for a record without that field, or with something else than text in it.
    """
    if text_field not in record:
        raise no_such_field(text_field, list(record), where)
    text = record[text_field]
    if text is not None and not isinstance(text, str):
        raise ConfigError(
            "data.text_field",
            text_field,
            f"holds {type(text).__name__}, not text, in {where}",
            "a field of strings",
        )
    return text or ""


def read_parquet(name: str, path: Path, text_field: str) -> Iterator[Document]:
    """A document a row, from the column `text_field`. Rows without text are passed over.

    Raises:
        ConfigError: for a file that is not Parquet, or has no such column of strings.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        why = str(error).splitlines()[0]
        raise ConfigError("data.path", path, f"not Parquet: {why}", "Parquet files (*.parquet)") from None
    with file:
        if text_field not in file.schema_arrow.names:
            raise no_such_field(text_field, file.schema_arrow.names, str(path))
        kind = file.schema_arrow.field(text_field).type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise ConfigError(
                "data.text_field", text_field, f"holds {kind}, not text, in {path}", "a column of strings"
            )
        index = 0
        for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                if text:
                    yield Document(f"{name}:{index}", text)
                index += 1


def no_such_field(text_field: str, fields: list[str], where: str) -> ConfigError:
    """The refusal of a record that lacks the text field, with the nearest one it has as the remedy."""
    near = nearest(text_field, fields)
    fix: dict[str, object] = {"data.text_field": near[0]} if near else {}
    return ConfigError(
        "data.text_field", text_field, f"no such field in {where}", f"one of {', '.join(near) or 'none'}", fix
    )


READERS: dict[DataSource, Reader] = {
    DataSource.pystdlib: read_python,
    DataSource.pysource: read_python,
    DataSource.text: read_text,
    DataSource.jsonl: read_jsonl,
    DataSource.parquet: read_parquet,
}
