"""Packed rows on disk: an Arrow folder that `datasets.load_from_disk` also reads, seen as one NumPy array."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tpresearch.config.errors import ConfigError
from tpresearch.data.cache import Meta

COLUMN = "input_ids"
ARROW_FILE = "data-00000-of-00001.arrow"


@dataclass(frozen=True)
class PackedCorpus:
    """A corpus as rows of tokens, memory-mapped: opening takes no memory, and a host's ranks share the pages.

    Attributes:
        train, held_out: [n, seq_len + 1], uint16 where the vocabulary fits, else uint32; read-only.
        corpus_hash: over what the text was; losses compare only between equal hashes.
        tokenizer_hash: over the tokenizer, which is tokenizer.json in `folder`.
        vocab_size: entries of the tokenizer; every token is below it.
        eos_id: the token that ends each document.
        unigram_entropy: nats a token of the held-out tokens under the train tokens' frequencies (each counted
            once more than seen): the loss of a model that knows how often each token occurs, and nothing
            else.
        meta: everything recorded when it was prepared, as in meta.json.
        folder: where it lies.
    """

    train: NDArray[np.unsignedinteger[Any]]
    held_out: NDArray[np.unsignedinteger[Any]]
    corpus_hash: str
    tokenizer_hash: str
    vocab_size: int
    eos_id: int
    unigram_entropy: float
    meta: Meta
    folder: Path

    def __str__(self) -> str:
        rows, row_tokens = self.train.shape
        return f"{rows} train and {len(self.held_out)} held-out rows of {row_tokens - 1} tokens"

    @classmethod
    def open(cls, folder: Path, meta: Meta) -> PackedCorpus:
        """The rows in `folder`, prepared and found intact, with its meta.json."""
        return cls(
            train=read_rows(folder / "train"),
            held_out=read_rows(folder / "held_out"),
            corpus_hash=meta["corpus_hash"],
            tokenizer_hash=meta["tokenizer_hash"],
            vocab_size=meta["vocab_size"],
            eos_id=meta["eos_id"],
            unigram_entropy=meta["unigram_entropy_nats"]["held_out"] or math.nan,
            meta=meta,
            folder=folder,
        )


def check_enough_rows(corpus: PackedCorpus, global_batch_size: int, multiple_of: int = 1) -> None:
    """Refuse a corpus that has not one global batch of train rows.

    Args:
        multiple_of: what divides a batch that is legal on this mesh, so that the one offered is.

    Raises:
        ConfigError: with a batch size, or a sequence length, that the corpus does fill.
    """
    rows, row_tokens = corpus.train.shape
    if rows >= global_batch_size:
        return
    tokens = corpus.meta["train"]["tokens"]
    if rows == 0:
        fix: dict[str, object] = (
            {"data.seq_len": tokens // global_batch_size - 1} if tokens > global_batch_size else {}
        )
        why = f"the train split has {tokens} tokens, fewer than one row of {row_tokens}"
        raise ConfigError("data.seq_len", row_tokens - 1, why, "a shorter sequence or more text", fix)
    why = f"the train split has {rows} rows of {row_tokens} tokens, fewer than one global batch"
    most = rows // multiple_of * multiple_of
    legal = f"at most {most}, a shorter data.seq_len, or more text" if most else "more text"
    fix = {"train.global_batch_size": most} if most else {}
    raise ConfigError("train.global_batch_size", global_batch_size, why, legal, fix)


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """uint16 for up to 65,536 entries, half the disk of uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def write_rows(folder: Path, tokens: NDArray[np.unsignedinteger[Any]], row_tokens: int) -> int:
    """Pack tokens [t] into rows [t // row_tokens, row_tokens], drop the rest, and say how many rows.

    `Dataset.save_to_disk` would cut the rows into record batches of a thousand, which cannot be seen as one
    array; so the folder is written here, in its format: one Arrow stream with one record batch, and two small
    JSON files.
    """
    rows = len(tokens) // row_tokens
    values = pa.array(tokens[: rows * row_tokens])  # views a memory map, copies nothing
    column = pa.FixedSizeListArray.from_arrays(values, row_tokens)
    features = {
        COLUMN: {
            "feature": {"dtype": tokens.dtype.name, "_type": "Value"},
            "length": row_tokens,
            "_type": "List",
        }
    }
    schema = pa.schema([pa.field(COLUMN, column.type)])
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    folder.mkdir()
    with pa.OSFile(str(folder / ARROW_FILE), "wb") as file, pa.ipc.new_stream(file, schema) as stream:
        stream.write_batch(pa.record_batch([column], schema=schema))
    state: dict[str, object] = {
        "_data_files": [{"filename": ARROW_FILE}],
        "_fingerprint": folder.parent.name.strip("."),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": None,
    }
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}, indent=2))
    return rows


def read_rows(folder: Path) -> NDArray[np.unsignedinteger[Any]]:
    """The rows [n, row_tokens] of a folder that `write_rows` wrote, without reading or copying them."""
    with pa.ipc.open_stream(pa.memory_map(str(folder / ARROW_FILE))) as stream:
        column = stream.read_all().column(COLUMN).chunk(0)
    flat = column.flatten().to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), column.type.list_size)
