"""Token streams on disk: the ids of all documents of a split, end to end, each closed by the end of text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpresearch.data.packed import token_dtype
from tpresearch.data.tokenizer import Tokenizer

BATCH_CHARS = 8 << 20
PARTS = ("train", "held_out")


def write_streams(
    folder: Path,
    texts: Iterable[tuple[str, str]],
    tokenizer: Tokenizer,
    max_tokens: int | None,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Tokenize documents into `<folder>/train.bin` and `held_out.bin`, with 8 MB of text in memory at a time.

    Args:
        texts: each document's train and held-out text.
        max_tokens: stop after the document that reaches it, counting both parts; None reads everything.
        advance: told the bytes of text done.

    Returns:
        For meta.json: the dtype; each part's documents, bytes and tokens; the two unigram entropies in nats.
    """
    dtype = token_dtype(tokenizer.size)
    counts = {part: {"documents": 0, "bytes": 0, "tokens": 0} for part in PARTS}
    unigrams = {part: np.zeros(tokenizer.size, np.int64) for part in PARTS}
    total = 0
    files = {part: (folder / f"{part}.bin").open("wb") for part in PARTS}
    try:
        for part, text, ids in _encoded(texts, tokenizer):
            ids = np.append(ids, tokenizer.eos_id).astype(dtype)
            files[part].write(ids.tobytes())
            size = len(text.encode(errors="replace"))
            for key, value in (("documents", 1), ("bytes", size), ("tokens", len(ids))):
                counts[part][key] += value
            unigrams[part] += np.bincount(ids, minlength=tokenizer.size)
            advance(size)
            total += len(ids)
            if max_tokens is not None and total >= max_tokens:
                break
    finally:
        for file in files.values():
            file.close()
    return {"dtype": dtype.name, **counts, "unigram_entropy_nats": unigram_entropy(**unigrams)}


def _encoded(
    texts: Iterable[tuple[str, str]], tokenizer: Tokenizer
) -> Iterator[tuple[str, str, NDArray[np.uint32]]]:
    """(part, text, ids) of every text that is not empty, encoded many at a time."""
    waiting: list[tuple[str, str]] = []
    chars = 0
    for both in texts:
        waiting += [(part, text) for part, text in zip(PARTS, both, strict=True) if text]
        chars += sum(map(len, both))
        if chars >= BATCH_CHARS:
            yield from _encode(waiting, tokenizer)
            waiting, chars = [], 0
    yield from _encode(waiting, tokenizer)


def _encode(
    waiting: list[tuple[str, str]], tokenizer: Tokenizer
) -> Iterator[tuple[str, str, NDArray[np.uint32]]]:
    ids = tokenizer.encode([text for _, text in waiting])
    return ((part, text, tokens) for (part, text), tokens in zip(waiting, ids, strict=True))


def read_stream(folder: Path, part: str, dtype: str) -> NDArray[np.unsignedinteger[Any]]:
    """The tokens [t] of a part, memory-mapped."""
    file = folder / f"{part}.bin"
    if file.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(file, dtype, mode="r")


def unigram_entropy(train: NDArray[np.int64], held_out: NDArray[np.int64]) -> dict[str, float | None]:
    """Nats a token, of counts [v]: `train` under its own frequencies, `held_out` under train's.

    Train counts are raised by one for the latter (Laplace), since a token that train never saw has infinite
    surprise.
    """
    share = train[train > 0] / max(train.sum(), 1)
    smoothed = np.log(train + 1) - np.log(train.sum() + len(train))
    seen = held_out.sum()
    return {
        "train": float(-(share * np.log(share)).sum()),
        "held_out": float(-(held_out * smoothed).sum() / seen) if seen else None,
    }
