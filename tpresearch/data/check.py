"""What is wrong with a data config, said before a process group, a tokenizer or an allocation exists."""

from __future__ import annotations

import os
from pathlib import Path

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig, TokenizerKind
from tpresearch.data.documents import READERS
from tpresearch.data.files import EMBEDDED, expand, looks_like_hub_id, named, python_files

PEEKED_FILES = 16
BYTES_AND_EOS = 257


def check_data(data: DataConfig, tokenizer: TokenizerConfig) -> None:
    """Refuse what could not be prepared, looking at the first record of the first files only.

    Raises:
        ConfigError: naming the field at fault.
    """
    _check_numbers(data)
    if data.source.is_synthetic:
        return
    _check_cache_dir(data)
    _check_tokenizer(tokenizer)
    if data.source is DataSource.hf:
        _check_hub_path(data)
    elif data.source in (DataSource.pystdlib, DataSource.pysource):
        python_files(with_torch=data.source is DataSource.pysource)
    else:
        _check_files(data)


def _check_numbers(data: DataConfig) -> None:
    if data.seq_len < 1:
        raise ConfigError("data.seq_len", data.seq_len, "a row has at least one token", "1 or more")
    if data.held_out_every < 2:
        why = "would hold out every document"
        raise ConfigError(
            "data.held_out_every", data.held_out_every, why, "2 or more", {"data.held_out_every": 20}
        )
    if data.max_tokens is not None and data.max_tokens < 1:
        raise ConfigError("data.max_tokens", data.max_tokens, "reads nothing", "null, or 1 or more")
    if data.streaming and data.source is not DataSource.hf:
        why = f"data.source={data.source} is not read over the network"
        raise ConfigError(
            "data.streaming", True, why, "data.streaming only with data=hf", {"data.streaming": None}
        )
    if data.streaming and data.max_tokens is None:
        why = "streaming without data.max_tokens has no end"
        raise ConfigError(
            "data.streaming", True, why, "a data.max_tokens beside it", {"data.max_tokens": 10_000_000}
        )


def _check_cache_dir(data: DataConfig) -> None:
    folder = Path(data.cache_dir).expanduser()
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        why = f"{nearest} is a file" if nearest != folder else "is a file"
    elif not os.access(nearest, os.W_OK | os.X_OK):
        why = f"no files can be written in {nearest}"
    else:
        return
    raise ConfigError("data.cache_dir", data.cache_dir, why, "a folder in which this user may write")


def _check_tokenizer(tokenizer: TokenizerConfig) -> None:
    if tokenizer.kind is TokenizerKind.bpe:
        if tokenizer.vocab_size < BYTES_AND_EOS:
            why = "a byte-level vocabulary has the 256 bytes and the end of text"
            legal = f"{BYTES_AND_EOS} or more"
            raise ConfigError(
                "tokenizer.vocab_size", tokenizer.vocab_size, why, legal, {"tokenizer.vocab_size": 4096}
            )
        return
    if not tokenizer.path:
        legal = "a tokenizer.json, a folder that holds one, or a name on the hub"
        raise ConfigError(
            "tokenizer.path", tokenizer.path, "no tokenizer is named", legal, {"tokenizer": "bpe"}
        )
    from tpresearch.data.tokenizer import load_hf

    size = load_hf(tokenizer.path).size
    if tokenizer.vocab_size < size:
        raise ConfigError(
            "tokenizer.vocab_size",
            tokenizer.vocab_size,
            f"{tokenizer.path} has {size} entries",
            f"{size}, or more to pad the embedding",
            {"tokenizer.vocab_size": size},
        )


def _check_hub_path(data: DataConfig) -> None:
    legal = "a hub id such as roneneldan/TinyStories, or a local folder of data files"
    if not isinstance(data.path, str) or not data.path:
        raise ConfigError("data.path", data.path, "no data set is named", legal, EMBEDDED)
    local = Path(data.path).expanduser()
    if local.is_file():
        raise ConfigError(
            "data.path", data.path, "is a file", f"{legal}; for files, data=jsonl, parquet or text"
        )
    if not local.exists() and not looks_like_hub_id(data.path):
        raise ConfigError("data.path", data.path, "there is no such folder", legal, EMBEDDED)
    from tpresearch.data.hub import check_hub

    check_hub(data)


def _check_files(data: DataConfig) -> None:
    files = named([file for file in expand(data.path) if file.stat().st_size])
    read = READERS[data.source]
    for name, file in files[:PEEKED_FILES]:
        try:
            next(read(name, file, data.text_field), None)
        except OSError as error:
            raise ConfigError(
                "data.path", file, f"cannot be read: {error.strerror or error}", "a readable file"
            ) from None
