"""Local text sources: which files a corpus has, in a fixed order, and one hash over them."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import DataConfig, DataSource
from tpresearch.data.documents import Document, read_file

# Which of these exist depends on how this Python was built; without them the corpus depends on it less.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "lib2to3", "site-packages", "dist-packages"}
PATH_TO_FILL_IN = {"data.path": "VALUE"}
HASH_DIGITS = 16
CACHE_HASH_ABOVE_BYTES = 1 << 30


@dataclass(frozen=True)
class Corpus:
    """A text corpus that can be read again and again, each time in the same order.

    Attributes:
        content_hash: 16 hex digits over the names and contents of everything that is read. Losses are
            comparable between runs only where it is the same.
        documents: starts a pass over the corpus. Names are unique and do not depend on the folder that holds
            it.
        size_bytes: bytes read by a whole pass, if known.
    """

    content_hash: str
    documents: Callable[[], Iterator[Document]]
    size_bytes: int | None


def open_files(data: DataConfig) -> Corpus:
    """The corpus of local files that `data` names: they are hashed (about 1 GB/s), not yet parsed.

    Raises:
        ConfigError: for a path that names nothing.
    """
    files = local_files(data)
    # A text file has no fields; where there are fields, another one is another corpus.
    field = data.text_field if data.source in (DataSource.jsonl, DataSource.parquet) else ""
    return Corpus(
        content_hash=hash_files(files, f"{data.source}:{field}", Path(os.path.expanduser(data.cache_dir))),
        documents=lambda: (document for file in files for document in read_file(data, *file)),
        size_bytes=sum(path.stat().st_size for _, path in files),
    )


def local_files(data: DataConfig) -> list[tuple[str, Path]]:
    """(name, path) of every file of a local source, sorted by name.

    Raises:
        ConfigError: for a path that names nothing, or files that are all empty.
    """
    if data.source not in (DataSource.pystdlib, DataSource.pysource):
        return relative_names(expand_paths(data.path))
    library = Path(sysconfig.get_paths()["stdlib"])
    files = _python_files(library, library)
    if not files:
        why = f"this Python has no source files in {library}"
        raise ConfigError("data.source", data.source, why, "data=text with your own path")
    if data.source is DataSource.pysource:
        spec = importlib.util.find_spec("torch")  # finds without importing
        assert spec, "tpresearch depends on torch"
        torch = Path(str(spec.origin)).parent
        files += _python_files(torch, torch.parent)
    return files


def _python_files(folder: Path, root: Path) -> list[tuple[str, Path]]:
    found = []
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        paths = (Path(where, name) for name in names if name.endswith(".py"))
        found += [(path.relative_to(root).as_posix(), path) for path in paths if path.is_file()]
    return sorted(found)


def expand_paths(path: Any) -> list[Path]:
    """The files that `data.path` names (a file, a glob with `**` or not, or a list of them), sorted by their absolute paths.

    Raises:
        ConfigError: for one that names nothing, names a folder, cannot be read, or when all are empty.
    """
    legal = "a file, a glob such as 'texts/**/*.txt', or a list of them"
    patterns = path if isinstance(path, list | tuple) else [path]
    if not patterns or not all(isinstance(pattern, str) and pattern for pattern in patterns):
        raise ConfigError("data.path", path, "no file is named", legal, PATH_TO_FILL_IN)
    files: dict[str, Path] = {}  # by absolute path: a file may be named in several ways
    for pattern in patterns:
        local = os.path.expanduser(pattern)
        if os.path.isdir(local):
            inside = {"data.path": f"'{glob.escape(pattern.rstrip('/'))}/**/*'"}
            raise ConfigError("data.path", pattern, "is a folder", legal, inside)
        # A name that exists is that file, whatever glob characters are in it.
        matches = [local] if os.path.exists(local) else glob.glob(local, recursive=True)
        found = {Path(match) for match in matches if not os.path.isdir(match)}
        if not found:
            why = "matches no file" if glob.has_magic(local) else "there is no such file"
            raise ConfigError(
                "data.path", pattern, f"{why} (seen from {os.getcwd()})", legal, PATH_TO_FILL_IN
            )
        for match in found:
            files.setdefault(os.path.abspath(match), match)
    for file in files.values():
        if not os.access(file, os.R_OK):
            legal = f"a file readable by this user, {os.getuid()}"
            raise ConfigError("data.path", file, "is not readable", legal)
    if not any(file.stat().st_size for file in files.values()):
        many = "is empty" if len(files) == 1 else f"all {len(files)} files are empty"
        raise ConfigError("data.path", path, many, "files with text in them", PATH_TO_FILL_IN)
    return [files[path] for path in sorted(files, key=Path)]


def relative_names(files: list[Path]) -> list[tuple[str, Path]]:
    """Each file by its path below the folder that holds them all: moving that folder renames nothing."""
    absolute = [Path(os.path.abspath(file)) for file in files]
    root = os.path.commonpath([file.parent for file in absolute])
    return [(file.relative_to(root).as_posix(), file) for file in absolute]


def hash_files(files: list[tuple[str, Path]], salt: str, cache_dir: Path | None = None) -> str:
    """16 hex digits over the names and the bytes of `files`.

    Above a gigabyte the answer is remembered in `cache_dir` under what the file system says of the files
    (path, inode, size, time of change), since every rank of every run asks again.
    """
    stats = [(name, path, path.stat()) for name, path in files]
    if cache_dir is None or sum(stat.st_size for *_, stat in stats) < CACHE_HASH_ABOVE_BYTES:
        return _hash_contents(files, salt)
    facts = (
        (name, path.resolve(), stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        for name, path, stat in stats
    )
    seen = "".join("\0".join(map(str, of_file)) + "\n" for of_file in facts)
    remembered = cache_dir / "contents" / hash_text(salt + seen)
    with suppress(OSError):
        if len(known := remembered.read_text()) == HASH_DIGITS:
            return known
    content = _hash_contents(files, salt)
    with suppress(OSError):
        remembered.parent.mkdir(parents=True, exist_ok=True)
        remembered.write_text(content)
    return content


def _hash_contents(files: list[tuple[str, Path]], salt: str) -> str:
    def content(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, hashlib.blake2b).hexdigest()

    return hash_text(salt + "".join(f"{name}\0{content(path)}\n" for name, path in files))


def hash_text(text: str) -> str:
    """16 hex digits over a text, in which names of files need not be UTF-8."""
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=HASH_DIGITS // 2).hexdigest()
