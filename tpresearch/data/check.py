"""Checks of the data config, made before anything is prepared or allocated."""

from __future__ import annotations

import os
import tempfile
from itertools import islice
from pathlib import Path

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig, TokenizerKind
from tpresearch.config.values import check_bounds
from tpresearch.data.documents import read_file
from tpresearch.data.hub import check_hub
from tpresearch.data.sources import local_files

CHECKED_FILES = 16
MIN_VOCAB_SIZE = 257
READS_PATH = (DataSource.text, DataSource.jsonl, DataSource.parquet, DataSource.hf)
LEGAL_CACHE = "a folder in which this user may write"


def check_data(data: DataConfig, tokenizer: TokenizerConfig) -> None:
    """Refuse data that could not be prepared, reading only the first record of the first files.

    Raises:
        ConfigError: naming the field at fault.
    """
    check_bounds(data, "data.")
    if not data.cache_dir.strip():
        raise ConfigError("data.cache_dir", data.cache_dir, "names no folder", LEGAL_CACHE)
    _check_path_is_read(data)
    if data.is_synthetic:
        return
    _check_streaming(data)
    _check_cache_dir(data)
    _check_tokenizer(tokenizer)
    if data.source is DataSource.hf:
        check_hub(data)
        return
    not_empty = (named for named in local_files(data) if named[1].stat().st_size)
    for name, file in islice(not_empty, CHECKED_FILES):
        next(read_file(data, name, file), None)


def _check_path_is_read(data: DataConfig) -> None:
    """Someone who names files and forgets their kind must not get a run on another corpus."""
    if data.path is None or data.source in READS_PATH:
        return
    first = data.path if isinstance(data.path, str) else next(iter(data.path), "")
    suffixes = {suffix.lstrip(".") for suffix in Path(first).suffixes}
    kind = next((source for source in (DataSource.jsonl, DataSource.parquet) if source in suffixes), "text")
    why = f"data={data.source} reads no path"
    legal = "data=text, jsonl, parquet or hf"
    raise ConfigError("data.path", data.path, why, legal, {"data": kind})


def _check_streaming(data: DataConfig) -> None:
    if data.streaming and data.source is not DataSource.hf:
        why = f"data.source={data.source} is not read over the network"
        legal = "data.streaming only with data=hf"
        raise ConfigError("data.streaming", True, why, legal, {"data.streaming": None})
    if data.streaming and data.max_tokens is None:
        why, fix = "streaming without data.max_tokens has no end", {"data.max_tokens": 10_000_000}
        raise ConfigError("data.streaming", True, why, "data.max_tokens as well", fix)


def _check_cache_dir(data: DataConfig) -> None:
    """Refuse a folder that nothing can be prepared in, unless something is: that can be read whoever it belongs to."""
    folder = Path(os.path.expanduser(data.cache_dir))
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not nearest.is_dir():
        why = f"{nearest} is a file" if nearest != folder else "is a file"
    elif not os.access(nearest, os.W_OK | os.X_OK) and not os.path.isdir(folder / "tokens"):
        why = f"{nearest} is not writable"
    else:
        return
    fix = {"data.cache_dir": Path(tempfile.gettempdir()) / "tpresearch"}
    raise ConfigError("data.cache_dir", data.cache_dir, why, LEGAL_CACHE, fix=fix)


def _check_tokenizer(tokenizer: TokenizerConfig) -> None:
    if tokenizer.kind is TokenizerKind.bpe:
        if tokenizer.path is not None:
            why, legal = "tokenizer=bpe reads no path: it is trained on the text", "tokenizer=hf"
            raise ConfigError("tokenizer.path", tokenizer.path, why, legal, {"tokenizer": "hf"})
        if tokenizer.vocab_size < MIN_VOCAB_SIZE:
            why = "a byte-level vocabulary has the 256 bytes and the end of text"
            legal, fix = f"{MIN_VOCAB_SIZE} or more", {"tokenizer.vocab_size": 4096}
            raise ConfigError("tokenizer.vocab_size", tokenizer.vocab_size, why, legal, fix)
        return
    from tpresearch.data.tokenizer import load_hf  # late: the tokenizers library is slow to import

    size = load_hf(tokenizer.path).size
    if tokenizer.vocab_size < size:
        why, legal = f"{tokenizer.path} has {size} entries", f"{size}, or more to pad the embedding"
        fix = {"tokenizer.vocab_size": size}
        raise ConfigError("tokenizer.vocab_size", tokenizer.vocab_size, why, legal, fix)
