"""Hugging Face datasets and tokenizers: from the hub, from earlier downloads, or from a local folder.

A local folder is read in place, so that nothing of it is kept twice; a hub data set is downloaded into the cache
of the `datasets` library, or streamed. Code that comes with a data set is never run (the library has no such
option).
"""

from __future__ import annotations

import dataclasses
import glob
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from tpresearch.config.errors import ConfigError, first_line
from tpresearch.config.network import is_reachable
from tpresearch.config.schema import DataConfig, DataSource
from tpresearch.data.documents import Document, documents_of, missing_field, read_file
from tpresearch.data.sources import PATH_TO_FILL_IN, Corpus, hash_files, hash_text

log = logging.getLogger(__name__)

LEGAL = "a hub id such as roneneldan/TinyStories, or a local folder of data files"
OWN_READERS = {".jsonl": DataSource.jsonl, ".ndjson": DataSource.jsonl, ".parquet": DataSource.parquet}


def looks_like_hub_id(path: str) -> bool:
    """Whether a path that does not exist could be `name` or `owner/name` on the hub."""
    name = r"[A-Za-z0-9][\w.-]*"
    is_id = re.fullmatch(rf"{name}(/{name})?", path) is not None
    return is_id and not path.endswith((".json", ".jsonl", ".parquet"))


def open_hub(data: DataConfig) -> Corpus:
    """The corpus of a hub data set or a local folder of one.

    Its content hash is over the files (local), or over the commit that the hub names.

    Raises:
        ConfigError: for a data set that does not exist, or a hub that cannot be reached.
    """
    if (folder := local_folder(data)) is None:
        # Once downloaded, the library names its folder by the revision, and finds it again without a network: the last
        # four parts are data set, configuration, version and commit.
        revision = "/".join(Path(_builder(data).cache_dir).parts[-4:])
        arguments = f"{data.path}:{data.name}:{data.split}:{data.text_field}"
        return Corpus(hash_text(f"hf:{revision}:{arguments}"), lambda: _documents(data), None)
    visible = _visible_files(folder)
    salt = f"hf:{data.name}:{data.split}:{data.text_field}"
    content = hash_files(visible, salt, Path(os.path.expanduser(data.cache_dir)))
    return Corpus(content, lambda: _documents(data), sum(path.stat().st_size for _, path in visible))


def _visible_files(folder: Path) -> list[tuple[str, Path]]:
    """Name and path of each file in a folder, or behind a link in it, that is not hidden, sorted."""
    names = glob.glob("**", root_dir=folder, recursive=True)
    return sorted((name, folder / name) for name in names if (folder / name).is_file())


def check_hub(data: DataConfig) -> None:
    """Refuse a data set that cannot be read: no such path, name, configuration, split or field, or no network.

    Raises:
        ConfigError: naming the field at fault.
    """
    if not isinstance(data.path, str) or not data.path:
        raise _path_error(data.path, "no dataset is named")
    if Path(os.path.expanduser(data.path)).is_file():
        legal = f"{LEGAL}; for files, data=jsonl, parquet or text"
        raise ConfigError("data.path", data.path, "is a file", legal)
    folder = local_folder(data)
    if folder is None and not looks_like_hub_id(data.path):
        raise _path_error(data.path, "there is no such folder")
    if folder is not None:
        _check_no_pattern(data, folder)
    if folder is not None or data.streaming:
        if next(_documents(data), None) is None:
            raise _path_error(data.path, "has no text in it")
        return
    # A dataset that will be downloaded whole is not fetched for this check: the hub lists its fields.
    features = _builder(data).info.features
    if features is not None and data.text_field not in features:
        raise missing_field(data.text_field, list(features), data.path)


def warn_of_unread_files(data: DataConfig) -> None:
    """Warn of a local folder's files that the library leaves out, unless the folder's card lists those to read: as soon as a name has
    the word train in it, files whose names have no split's in them are in none.
    """
    folder = local_folder(data)
    if folder is None or _is_saved(folder) or _lists_files(folder / "README.md"):
        return
    splits = _builder(dataclasses.replace(data, path=str(folder))).config.data_files or {}
    read = {os.path.realpath(file) for files in splits.values() for file in files}
    kinds = {Path(file).suffix for file in read}
    visible = [(name, os.path.realpath(path)) for name, path in _visible_files(folder)]
    if left := [name for name, path in visible if Path(path).suffix in kinds and path not in read]:
        said = "%d files of %s are in no split, such as %s: the datasets library takes split names from file names; data=%s reads all that a glob matches"
        kind = OWN_READERS.get(Path(left[0]).suffix, DataSource.text)
        log.warning(said, len(left), folder, left[0], kind)


def _lists_files(card: Path) -> bool:
    return card.is_file() and re.search(rb"^configs:", card.read_bytes(), re.MULTILINE) is not None


def _check_no_pattern(data: DataConfig, folder: Path) -> None:
    """Refuse a folder in whose place the library would read whatever folders its path matches, or none."""
    path = str(folder.resolve())
    if not _is_saved(folder) and (glob.has_magic(path) or "::" in path):
        why = f"the datasets library would take {path} for a pattern"
        legal = "a folder without * ? [ and :: in its path; data=jsonl, parquet and text read any"
        raise ConfigError("data.path", data.path, why, legal)


def _is_saved(folder: Path) -> bool:
    """Whether the library's `save_to_disk` has written this folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def local_folder(data: DataConfig) -> Path | None:
    """The folder that data.path names; None for a name on the hub."""
    folder = Path(os.path.expanduser(str(data.path)))
    return folder if folder.is_dir() else None


def _documents(data: DataConfig) -> Iterator[Document]:
    return documents_of(_records(data), data.text_field, "", f"{data.path}, row")


def _records(data: DataConfig) -> Iterator[dict[str, Any]]:
    datasets = _library(data)
    folder = local_folder(data)
    source = str(folder or data.path)
    try:
        if folder and _is_saved(folder):
            found = _saved_split(data, datasets.load_from_disk(source))
        else:
            in_place = data.streaming or folder is not None
            found = datasets.load_dataset(source, data.name, split=data.split, streaming=in_place)
        yield from found
    except ConfigError:
        raise
    except Exception as error:  # a dozen kinds, by format and by what the network did
        raise _load_error(data, error) from error


def _saved_split(data: DataConfig, saved: Any) -> Any:
    """The split of what `save_to_disk` wrote: all splits, or one, which is also what the default names."""
    if not isinstance(saved, dict):
        saved = dict.fromkeys([DataConfig().split, str(saved.split or DataConfig().split)], saved)
    if data.split not in saved:
        legal = f"one of {', '.join(saved)}"
        raise ConfigError("data.split", data.split, f"not a split of {data.path}", legal)
    return saved[data.split]


def _builder(data: DataConfig) -> Any:
    datasets = _library(data)
    try:
        return datasets.load_dataset_builder(str(data.path), data.name)
    except Exception as error:
        raise _load_error(data, error) from error


def _library(data: DataConfig) -> Any:
    """The `datasets` library, offline where it should be, and quiet about errors that we report ourselves."""
    if local_folder(data) is None:
        offline_unless_reachable()
    import datasets  # takes a second

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _load_error(data: DataConfig, error: BaseException) -> ConfigError:
    from datasets.exceptions import DatasetGenerationError
    from datasets.table import CastError

    if isinstance(error, DatasetGenerationError) and error.__cause__:
        error = error.__cause__
    if isinstance(error, CastError):
        columns = error.table_column_names, error.requested_column_names
        some, first = (", ".join(sorted(names)) for names in columns)
        why = f"its data files differ in columns: some have {some}, the first has {first}"
        legal = "files with the same columns, or data=jsonl or parquet, which read only data.text_field"
        return ConfigError("data.path", data.path, why, legal)
    folder = local_folder(data)
    if folder and (fault := _own_readers_error(data, folder)):
        return fault
    where = str(data.path) if folder is None else _first_unreadable_file(data, folder)
    nothing = isinstance(error, StopIteration) or "BatchSize must be greater than 0" in str(error)
    said = "has no text in it" if nothing else first_line(error)
    if said.startswith(("Bad split", "Unknown split")):
        return ConfigError("data.split", data.split, said, "a split of that data set")
    if "config" in said.lower() and isinstance(error, ValueError):
        return ConfigError("data.name", data.name, said, "a configuration of that data set")
    if folder is None and not offline_unless_reachable():
        said = f"{_endpoint()} cannot be reached, and neither a local folder nor the datasets cache has it"
    return _path_error(where, said)


def _path_error(where: object, why: str) -> ConfigError:
    return ConfigError("data.path", where, why, LEGAL, PATH_TO_FILL_IN)


def _own_readers_error(data: DataConfig, folder: Path) -> ConfigError | None:
    """The first error of our own readers in files that the library could not read: it names the line or row."""
    for name, path in _visible_files(folder):
        plain = path.with_suffix("") if path.suffix == ".gz" else path
        if own := OWN_READERS.get(plain.suffix):
            try:
                for _ in read_file(dataclasses.replace(data, source=own), name, path):
                    pass
            except ConfigError as error:
                return error
    return None


def _first_unreadable_file(data: DataConfig, folder: Path) -> str:
    """The first file that the library cannot read alone; the folder if there is none."""
    load = partial(_library(data).load_dataset, str(folder), split="train", streaming=True)
    for name, path in _visible_files(folder):
        if path.suffix not in (".md", ".yaml"):
            try:
                for _ in load(data_files=[name]):
                    pass
            except Exception:
                return str(path)
    return str(data.path)


def download(name: str, files: Sequence[str], refused: Callable[[str], ConfigError]) -> Path:
    """The folder of a hub repository's files, from the hub or from what was downloaded before.

    Any number of processes may ask at once: one downloads a file, the others wait for it.

    Args:
        files: names or patterns of the wanted files. refused: creates the error from a reason.

    Raises:
        ConfigError: if there is no such name, or no network.
    """
    reached = offline_unless_reachable()
    try:
        return _snapshot(name, tuple(files))
    except Exception as error:  # a dozen kinds, by what the network did
        offline = f"{_endpoint()} cannot be reached, and there is no such file here"
        raise refused(first_line(error) if reached else offline) from None


@cache
def _snapshot(name: str, files: tuple[str, ...]) -> Path:
    """Asked once per process: a config asks for the same file many times."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(files)))


@cache
def offline_unless_reachable() -> bool:
    """Whether the hub can be reached. If not, its library is set to use only its cache from then on:
    it would retry every file for 25 s and more.
    """
    if is_reachable(_endpoint()):
        return True
    log.debug("%s cannot be reached: using cached files only", _endpoint())
    # They read the variable once, when imported, which may have happened.
    os.environ["HF_HUB_OFFLINE"] = "1"
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    return False


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")
