"""Token streams on disk: the ids of all documents of a split, end to end, each closed by the end of text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tpresearch.data.cache import Meta
from tpresearch.data.documents import Parts
from tpresearch.data.tokenizer import Tokenizer, cut_parts

log = logging.getLogger(__name__)

SPLITS = ("train", "held_out")
ENCODE_CHARS = 8 << 20

Tokens = NDArray[np.unsignedinteger[Any]]


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
