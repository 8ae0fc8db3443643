"""Rows that nobody wrote: numbers or tokens drawn uniformly, each a pure function of (seed, step, row)."""

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
    """A source without end, a file or a cache, for benchmarks and for networks that take numbers.

    Attributes:
        width: numbers or tokens a row.
        vocab_size: tokens are drawn below it; None for numbers in [0, 1).
        train, held_out: empty, since no rows are kept; there are none to evaluate on.
        unigram_entropy: nats a token, and the least loss there is; None for numbers.
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
        what = f"tokens of {self.vocab_size:,}" if self.vocab_size else "numbers"
        return f"rows of {self.width} {what}, drawn as they are read, none held out"

    def draw(self, seed: int, step: int, row: int) -> NDArray[Any]:
        """Row `row` of global batch `step`: [width] float32 in [0, 1), or [s + 1] int64."""
        generator = np.random.default_rng([seed, step, row])
        if self.vocab_size is None:
            return generator.random(self.width, dtype=np.float32)
        return generator.integers(self.vocab_size, size=self.width)


AnyCorpus = PackedCorpus | Synthetic
