"""Sources of rows: a tokenized and packed corpus, memory-mapped from disk, or synthetic rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HfTokenizer

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig
from tpresearch.data.cache import Meta
from tpresearch.data.streams import SPLITS, Tokens, read_rows
from tpresearch.data.tokenizer import TOKENIZER_FILE, Tokenizer, save_tokenizer


@dataclass(frozen=True)
class PackedCorpus:
    """A corpus as rows of tokens, memory-mapped: opening takes no memory, and a host's ranks share the pages.

    Attributes:
        train, held_out: [n, seq_len + 1], uint16 where the vocabulary fits, else uint32; read-only.
        corpus_hash: over the text; losses are comparable only between equal hashes.
        tokenizer_hash: over the tokenizer, which is tokenizer.json in `folder`.
        vocab_size: entries of the tokenizer; every token is below it.
        eos_id: the token that ends each document.
        unigram_entropy: nats per held-out token under the train tokens' frequencies (each counted once more
            than seen): the loss of a model that knows only how often each token occurs.
        meta: everything recorded when it was prepared, as in meta.json.
        folder: its path.
    """

    train: Tokens
    held_out: Tokens
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
    def open(cls, folder: Path, meta: Meta, seq_len: int) -> PackedCorpus:
        """The rows of `seq_len` + 1 tokens in `folder`, prepared and found intact, with its meta.json."""
        train, held_out = (read_rows(folder / f"{split}.bin", meta["dtype"], seq_len + 1) for split in SPLITS)
        facts = {key: meta[key] for key in ("corpus_hash", "tokenizer_hash", "vocab_size", "eos_id")}
        entropy = meta["unigram_entropy_nats"]["held_out"] or math.nan
        return cls(train, held_out, **facts, unigram_entropy=entropy, meta=meta, folder=folder)

    def save_tokenizer(self, config: TokenizerConfig, run: Path) -> None:
        """Save the tokenizer in a run's folder: see `tokenizer.save_tokenizer`."""
        backend = HfTokenizer.from_file(str(self.folder / TOKENIZER_FILE))
        save_tokenizer(Tokenizer(backend, self.eos_id), config, run)


def check_enough_rows(corpus: PackedCorpus, global_batch_size: int, multiple_of: int = 1) -> None:
    """Refuse a corpus whose train rows do not fill one global batch.

    Args:
        multiple_of: divides every batch size that is legal on this mesh, so that the proposed one is legal.

    Raises:
        ConfigError: proposing a batch size or sequence length that the corpus fills.
    """
    rows, row_tokens = corpus.train.shape
    if rows >= global_batch_size:
        return
    tokens = corpus.meta["train"]["tokens"]
    if rows == 0:
        fix = {"data.seq_len": tokens // global_batch_size - 1} if tokens >= 2 * global_batch_size else {}
        why = f"the train split has {tokens} tokens, fewer than one row of {row_tokens}"
        raise ConfigError("data.seq_len", row_tokens - 1, why, "a shorter sequence or more text", fix)
    why = f"the train split has {rows} rows of {row_tokens} tokens, fewer than one global batch"
    most = rows // multiple_of * multiple_of
    legal = f"at most {most}, a shorter data.seq_len, or more text" if most else "more text"
    fix = {"train.global_batch_size": most} if most else {}
    raise ConfigError("train.global_batch_size", global_batch_size, why, legal, fix)


@dataclass(frozen=True)
class SyntheticCorpus:
    """An endless source without a file or a cache, for benchmarks and for networks that take floats.

    Attributes:
        width: floats or tokens per row.
        vocab_size: tokens are drawn below it; None for floats in [0, 1).
        train, held_out: empty, since no rows are kept; there are none to evaluate on.
        unigram_entropy: nats per token, the minimum loss; None for floats.
    """

    source: DataSource
    width: int
    vocab_size: int | None

    tokenizer_hash = "none"
    train = held_out = np.empty((0, 0), np.uint16)

    @classmethod
    def of(cls, data: DataConfig, tokenizer: TokenizerConfig) -> SyntheticCorpus:
        if data.source is DataSource.uniform:
            assert data.width
            return cls(data.source, data.width, None)
        return cls(data.source, data.seq_len + 1, tokenizer.vocab_size)

    @property
    def corpus_hash(self) -> str:
        return f"{self.source}-{self.width}" + (f"-of-{self.vocab_size}" if self.vocab_size else "")

    @property
    def meta(self) -> dict[str, Any]:
        return {"source": str(self.source)}

    @property
    def unigram_entropy(self) -> float | None:
        return math.log(self.vocab_size) if self.vocab_size else None

    def __str__(self) -> str:
        what = f"random tokens below {self.vocab_size:,}" if self.vocab_size else "random floats"
        return f"rows of {self.width} {what}, generated as they are read, none held out"

    def rows(self, seed: int, step: int, rows: range) -> NDArray[Any]:
        """These rows of global batch `step`: [b, width] float32 in [0, 1), or [b, s + 1] int64."""
        return np.stack([self._row(np.random.default_rng([seed, step, row])) for row in rows])

    def _row(self, generator: np.random.Generator) -> NDArray[Any]:
        if self.vocab_size is None:
            return generator.random(self.width, dtype=np.float32)
        return generator.integers(self.vocab_size, size=self.width)


AnyCorpus = PackedCorpus | SyntheticCorpus


def described(corpus: AnyCorpus, rows: int) -> str:
    """The corpus in a few words, and how often a run of so many train rows reads each, where that is more than once."""
    there = len(corpus.train)
    return f"{corpus}, the former read {rows / there:.3g} times" if 0 < there < rows else str(corpus)
