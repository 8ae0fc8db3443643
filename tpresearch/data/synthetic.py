"""Synthetic data: uniform random tokens or floats, each row a pure function of (seed, step, row)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig
from tpresearch.data.packed import PackedCorpus


@dataclass(frozen=True)
class Synthetic:
    """An endless source without a file or a cache, for benchmarks and for networks that take floats.

    Attributes:
        width: floats or tokens per row.
        vocab_size: tokens are drawn below it; None for floats in [0, 1).
        train, held_out: empty, since no rows are kept; there are none to evaluate on.
        unigram_entropy: nats per token, and the least possible loss; None for floats.
    """

    source: DataSource
    width: int
    vocab_size: int | None

    tokenizer_hash = "none"
    train = held_out = np.empty((0, 0), np.uint16)

    @classmethod
    def of(cls, data: DataConfig, tokenizer: TokenizerConfig) -> Synthetic:
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


AnyCorpus = PackedCorpus | Synthetic
