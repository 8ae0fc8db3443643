"""Sources of rows: a tokenized and packed corpus, memory-mapped from disk, or synthetic rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer as HfTokenizer

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig
from tpresearch.data.cache import Meta
from tpresearch.data.documents import Parts
from tpresearch.data.tokenizer import TOKENIZER_FILE, Tokenizer, cut_parts, save_tokenizer

log = logging.getLogger(__name__)

SPLITS = ("train", "held_out")
ENCODE_CHARS = 8 << 20

Tokens = NDArray[np.unsignedinteger[Any]]


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
        fix = {"data.seq_len": tokens // global_batch_size - 1} if tokens > global_batch_size else {}
        why = f"the train split has {tokens} tokens, fewer than one row of {row_tokens}"
        raise ConfigError("data.seq_len", row_tokens - 1, why, "a shorter sequence or more text", fix)
    why = f"the train split has {rows} rows of {row_tokens} tokens, fewer than one global batch"
    most = rows // multiple_of * multiple_of
    legal = f"at most {most}, a shorter data.seq_len, or more text" if most else "more text"
    fix = {"train.global_batch_size": most} if most else {}
    raise ConfigError("train.global_batch_size", global_batch_size, why, legal, fix)


# Token streams: the ids of all documents of a split, end to end, each closed by the end of text.


def write_streams(
    folder: Path,
    texts: Iterable[tuple[Parts, Parts]],
    tokenizer: Tokenizer,
    max_tokens: int | None,
    advance: Callable[[int], None],
) -> Meta:
    """Tokenize documents into `<folder>/train.bin` and `held_out.bin`, with 8 MB of text in memory at a time.

    Args:
        texts: each document's train and held-out text, in parts.
        max_tokens: stop after the document that reaches it, counting both splits; None reads everything.
        advance: called with the bytes of text done.

    Returns:
        For meta.json: the dtype; each split's documents, bytes and tokens; the two unigram entropies in nats.
    """
    dtype = token_dtype(tokenizer.size)
    counts = {split: {"documents": 0, "bytes": 0, "tokens": 0} for split in SPLITS}
    unigrams = {split: np.zeros(tokenizer.size, np.int64) for split in SPLITS}
    with (folder / "train.bin").open("wb") as train, (folder / "held_out.bin").open("wb") as held_out:
        files = {"train": train, "held_out": held_out}
        for piece, encoded in _encode_in_batches(texts, tokenizer):
            ids = (np.append(encoded, tokenizer.eos_id) if piece.is_last else encoded).astype(dtype)
            files[piece.split].write(ids.tobytes())
            size = len(piece.text.encode())
            for key, value in (("documents", piece.is_last), ("bytes", size), ("tokens", len(ids))):
                counts[piece.split][key] += value
            np.add.at(unigrams[piece.split], ids, 1)  # bincount would pass over the whole vocabulary
            advance(size)
            tokens = sum(count["tokens"] for count in counts.values())
            if max_tokens is not None and piece.is_last and tokens >= max_tokens:
                break
    ends = sum(unigrams[split][tokenizer.eos_id] - counts[split]["documents"] for split in SPLITS)
    if ends:
        token = tokenizer.backend.id_to_token(tokenizer.eos_id)
        log.warning("this tokenizer takes the text %s for the end of a document: %d times here", token, ends)
    return {"dtype": dtype.name, **counts, "unigram_entropy_nats": unigram_entropy(**unigrams)}


class _Piece(NamedTuple):
    """A part of a document, all of it unless it is long."""

    split: str
    text: str
    is_last: bool


def _encode_in_batches(
    texts: Iterable[tuple[Parts, Parts]], tokenizer: Tokenizer
) -> Iterator[tuple[_Piece, Tokens]]:
    """The pieces of every text that is not empty, and their ids, encoded many at a time: a token takes a hundred bytes while it is."""
    waiting: list[_Piece] = []
    chars = 0
    for piece in _pieces(texts, tokenizer.piece_chars):
        waiting.append(piece)
        chars += len(piece.text)
        if chars >= ENCODE_CHARS:
            yield from zip(waiting, tokenizer.encode([each.text for each in waiting]), strict=True)
            waiting, chars = [], 0
    yield from zip(waiting, tokenizer.encode([each.text for each in waiting]), strict=True)


def _pieces(texts: Iterable[tuple[Parts, Parts]], piece_chars: int) -> Iterator[_Piece]:
    for train, held_out in texts:
        # What is held out first: the other part may reach max_tokens.
        for split, parts in (("held_out", held_out), ("train", train)):
            for piece, following in pairwise(chain(cut_parts(parts, piece_chars), [""])):
                yield _Piece(split, piece, is_last=not following)


def token_dtype(vocab_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """uint16 for up to 65,536 entries, half the disk of uint32."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def unigram_entropy(train: NDArray[np.int64], held_out: NDArray[np.int64]) -> dict[str, float | None]:
    """Nats per token, from counts [v]: `train` under its own frequencies, `held_out` under train's.

    Train counts are raised by one for the latter (Laplace), since a token that never occurs in train would
    have infinite loss.
    """
    share = train[train > 0] / max(train.sum(), 1)
    smoothed = np.log(train + 1) - np.log(train.sum() + len(train))
    seen = held_out.sum()
    return {
        "train": float(-(share * np.log(share)).sum()),
        "held_out": float(-(held_out * smoothed).sum() / seen) if seen else None,
    }


def read_rows(file: Path, dtype: str, row_tokens: int) -> Tokens:
    """The tokens [t] of a file as rows [t // row_tokens, row_tokens], without reading or copying them; the rest is dropped."""
    rows = file.stat().st_size // np.dtype(dtype).itemsize // row_tokens
    if rows == 0:  # nothing cannot be mapped
        return np.empty((0, row_tokens), dtype)
    return np.asarray(np.memmap(file, dtype, mode="r", shape=(rows, row_tokens)))


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
