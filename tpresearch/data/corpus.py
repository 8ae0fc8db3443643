"""The documents of every data source, in a fixed order, and one hash over all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tpresearch.config.schema import DataConfig, DataSource
from tpresearch.data.documents import READERS, Document
from tpresearch.data.files import expand, named, python_files

HASH_BYTES = 8
REMEMBER_ABOVE_BYTES = 1 << 30


@dataclass(frozen=True)
class Corpus:
    """A text corpus that can be read again and again, each time in the same order.

    Attributes:
        content_hash: 16 hex digits over the names and contents of everything that is read. Losses are
            comparable between runs only where it is the same.
        documents: starts a pass over the corpus. Names are unique and do not depend on the folder that holds
            it.
        size_bytes: what a whole pass reads, where that is known.
    """

    content_hash: str
    documents: Callable[[], Iterator[Document]]
    size_bytes: int | None


def open_corpus(data: DataConfig) -> Corpus:
    """The corpus that `data` names: its files are hashed (about 1 GB/s), not yet parsed.

    Raises:
        ConfigError: for a path that names nothing, or a hub that cannot be reached.
    """
    if data.source is DataSource.hf:
        from tpresearch.data.hub import open_hub  # the datasets library takes a second to import

        return open_hub(data)
    if data.source in (DataSource.pystdlib, DataSource.pysource):
        files = python_files(with_torch=data.source is DataSource.pysource)
    else:
        files = named(expand(data.path))
    read = READERS[data.source]

    def documents() -> Iterator[Document]:
        for name, path in files:
            yield from read(name, path, data.text_field)

    # A text file has no fields; where there are, another field is another corpus.
    field = data.text_field if data.source in (DataSource.jsonl, DataSource.parquet) else ""
    return Corpus(
        content_hash=hash_files(files, f"{data.source}:{field}", Path(data.cache_dir).expanduser()),
        documents=documents,
        size_bytes=sum(path.stat().st_size for _, path in files),
    )


def hash_files(files: list[tuple[str, Path]], salt: str, cache_dir: Path | None = None) -> str:
    """16 hex digits over the names and the bytes of `files`.

    Above a gigabyte the answer is remembered in `cache_dir` under what the file system says of the files
    (path, inode, size, time of change), since every rank of every run asks again.
    """
    stats = [(name, str(path.resolve()), path.stat()) for name, path in files]
    if cache_dir is None or sum(stat.st_size for *_, stat in stats) < REMEMBER_ABOVE_BYTES:
        return _hash_contents(files, salt)
    seen = hashlib.blake2b(salt.encode(), digest_size=HASH_BYTES)
    for name, path, stat in stats:
        seen.update(
            f"{name}\0{path}\0{stat.st_ino}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}\n".encode()
        )
    remembered = cache_dir / "contents" / seen.hexdigest()
    if remembered.is_file() and len(known := remembered.read_text()) == 2 * HASH_BYTES:
        return known
    content = _hash_contents(files, salt)
    remembered.parent.mkdir(parents=True, exist_ok=True)
    remembered.write_text(content)
    return content


def _hash_contents(files: list[tuple[str, Path]], salt: str) -> str:
    total = hashlib.blake2b(salt.encode(), digest_size=HASH_BYTES)
    for name, path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, hashlib.blake2b).hexdigest()
        total.update(f"{name}\0{content}\n".encode())
    return total.hexdigest()
