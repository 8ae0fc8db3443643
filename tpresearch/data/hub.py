"""Data sets of the Hugging Face hub, and local folders of them, through the `datasets` library.

A local folder is read in place, so that nothing of it is kept twice; a hub data set is downloaded into that
library's own cache, or streamed. Code that comes with a data set is never run (the library has no such
option).
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import DataConfig
from tpresearch.data.corpus import HASH_BYTES, Corpus, hash_files
from tpresearch.data.documents import Document, no_such_field, text_of
from tpresearch.data.files import EMBEDDED

log = logging.getLogger(__name__)

LEGAL = "a hub id such as roneneldan/TinyStories, or a local folder of data files"
TOKENIZER_FILES = ["tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json", "config.json"]
PROBE_SECONDS = 3.0


def open_hub(data: DataConfig) -> Corpus:
    """The corpus of a hub data set or a local folder of one.

    Its content hash is over the files (local), or over the revision and the files that the hub names.

    Raises:
        ConfigError: for a data set that is not there, or a hub that cannot be reached.
    """
    path = str(data.path)
    local = Path(path).expanduser()
    if local.is_dir():
        visible = [file for file in local.rglob("*") if file.is_file() and not file.name.startswith(".")]
        files = sorted((file.relative_to(local).as_posix(), file) for file in visible)
        salt = f"hf:{data.name}:{data.split}:{data.text_field}"
        content = hash_files(files, salt, Path(data.cache_dir).expanduser())
        size = sum(file.stat().st_size for _, file in files)
    else:
        content, size = _hub_hash(data), None

    def documents() -> Iterator[Document]:
        records = _records(data, local if local.is_dir() else None)
        for index, record in enumerate(records):
            if text := text_of(record, data.text_field, f"{path}, row {index + 1}"):
                yield Document(str(index), text)

    return Corpus(content, documents, size)


def check_hub(data: DataConfig) -> None:
    """Refuse a data set that cannot be read: no such name, configuration, split or field, or no network."""
    local = Path(str(data.path)).expanduser()
    if local.is_dir() or data.streaming:
        if next(iter(open_hub(data).documents()), None) is None:
            raise ConfigError("data.path", data.path, "has no text in it", LEGAL, EMBEDDED)
        return
    # What is downloaded whole is not fetched for a check: the hub says what fields it has.
    features = _builder(data).info.features
    if features is not None and data.text_field not in features:
        raise no_such_field(data.text_field, list(features), str(data.path))


def _records(data: DataConfig, local: Path | None) -> Iterator[dict[str, Any]]:
    import datasets

    source = str(local or data.path)
    try:
        if local is not None and (local / "state.json").is_file():
            found = datasets.load_from_disk(source)
        elif local is not None and (local / "dataset_dict.json").is_file():
            found = datasets.load_from_disk(source)[data.split]
        else:
            if local is None:
                offline_unless_reachable()
            streaming = data.streaming or local is not None
            found = datasets.load_dataset(source, data.name, split=data.split, streaming=streaming)
        yield from found
    except ConfigError:
        raise
    except Exception as error:  # a dozen kinds, by format and by what the network did
        raise _refusal(data, error) from error


def _hub_hash(data: DataConfig) -> str:
    builder = _builder(data)
    # Once downloaded, the library names its folder by the revision, and finds it again without a network.
    revision = "/".join(Path(builder.cache_dir).parts[-4:])  # data set, configuration, version, commit
    arguments = f"{data.path}:{data.name}:{data.split}:{data.text_field}"
    return hashlib.blake2b(f"hf:{revision}:{arguments}".encode(), digest_size=HASH_BYTES).hexdigest()


def _builder(data: DataConfig) -> Any:
    offline_unless_reachable()
    import datasets

    try:
        return datasets.load_dataset_builder(str(data.path), data.name)
    except Exception as error:
        raise _refusal(data, error) from error


def _refusal(data: DataConfig, error: Exception) -> ConfigError:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    if said.startswith(("Bad split", "Unknown split")):
        return ConfigError("data.split", data.split, said, "a split of that data set")
    if "config" in said.lower() and isinstance(error, ValueError):
        return ConfigError("data.name", data.name, said, "a configuration of that data set")
    if not Path(str(data.path)).expanduser().exists() and not offline_unless_reachable():
        said = f"{_endpoint()} cannot be reached, and neither a local folder nor the datasets cache has it"
    return ConfigError("data.path", data.path, said, LEGAL, EMBEDDED)


def download_tokenizer(name: str, legal: str) -> Path:
    """The folder of a tokenizer's files, from the hub or from what was downloaded before.

    Raises:
        ConfigError: where there is no such name, or no network.
    """
    reached = offline_unless_reachable()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=TOKENIZER_FILES))
    except Exception as error:  # a dozen kinds, by what the network did
        said = (str(error).splitlines() or [type(error).__name__])[0]
        why = said if reached else f"{_endpoint()} cannot be reached, and there is no such file here"
        raise ConfigError(
            "tokenizer.path", name, why, legal, {"tokenizer": "bpe", "tokenizer.path": None}
        ) from None


@lru_cache
def offline_unless_reachable() -> bool:
    """Whether the hub answers. If not, its library is told to use what it has cached, once and for all.

    It would retry every file for 25 s and more. A proxy that is set stands for the hub.
    """
    proxy = urllib.request.getproxies().get("https")
    address = urllib.parse.urlsplit(proxy or _endpoint())
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), timeout=PROBE_SECONDS).close()
    except OSError as error:
        log.debug("%s cannot be reached (%s): using cached files only", _endpoint(), error)
        # They read the variable once, when imported, which may have happened.
        os.environ["HF_HUB_OFFLINE"] = "1"
        import huggingface_hub.constants

        huggingface_hub.constants.HF_HUB_OFFLINE = True
        return False
    return True


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")
