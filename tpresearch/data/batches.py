"""The rows that each step reads: a pure function of (seed, step), independent of plan, mesh and restarts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tpresearch.config.schema import DataConfig, DataSource
from tpresearch.data.rows import AnyCorpus, PackedCorpus, SyntheticCorpus

IGNORE_INDEX = -100
"""A target that the loss ignores, such as those of rows that only pad a batch."""


class Batch(NamedTuple):
    """Inputs and targets.

    Attributes:
        inputs: tokens [b, s] int64, or rows of floats [b, width] float32.
        targets: the next token of each position [b, s] int64, `IGNORE_INDEX` where there is none; [b, 0] float32
            with float inputs, which have no targets.
    """

    inputs: Tensor
    targets: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Batch:
        """From rows of tokens [b, s + 1], of which inputs and targets are copies, or of floats [b, width]."""
        if rows.is_floating_point():
            return cls(rows, rows.new_empty(len(rows), 0))
        return cls(rows[:, :-1].clone(), rows[:, 1:].clone())

    def split(self, rows: int) -> list[Batch]:
        """Micro-batches of `rows` rows; the last one takes the rest."""
        pieces = zip(self.inputs.split(rows), self.targets.split(rows), strict=True)
        return [Batch(inputs, targets) for inputs, targets in pieces]

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Batch:
        """The batch on `device`; a GPU copies it asynchronously from pinned memory.

        Args:
            dtype: of inputs that are floats; None leaves them as they are.
        """
        inputs, targets = self
        if device.type == "cuda":
            inputs, targets = inputs.pin_memory(), targets.pin_memory()
        inputs, targets = (t.to(device, non_blocking=True) for t in (inputs, targets))
        return Batch(inputs.to(dtype) if dtype and inputs.is_floating_point() else inputs, targets)


def meta_batch(data: DataConfig, rows: int) -> Batch:
    """A batch of `rows` rows of this config by shape and dtype, on the meta device: nothing is read."""
    if data.source is DataSource.uniform:
        return Batch.of(torch.empty(rows, data.width or 0, device="meta"))
    return Batch.of(torch.empty(rows, data.seq_len + 1, dtype=torch.int64, device="meta"))


class Batches:
    """The endless sequence of global batches. There is no state to save: to resume, the step is enough.

    Of packed rows, each epoch e is its own permutation, `default_rng([seed, e]).permutation(n)`; the epochs
    are concatenated and step k (from 0) takes the k-th `global_batch_size` of them. A batch may span the
    end of an epoch, so that no row is ever dropped, and within an epoch no row is read twice. Of a synthetic
    source, row i of step k is drawn by (seed, k, i).

    Args:
        source: a corpus, or packed rows [n, s + 1] of any integer dtype.
        global_batch_size: rows per optimizer step, over all ranks and accumulation.
        seed: chooses the order, or what is drawn.
        repeat: repeat the first N batches; None for all.
    """

    def __init__(
        self,
        source: AnyCorpus | NDArray[np.integer],
        global_batch_size: int,
        seed: int,
        repeat: int | None = None,
    ) -> None:
        rows = source.train if isinstance(source, PackedCorpus) else source
        count = None if isinstance(rows, SyntheticCorpus) else len(rows)
        if count == 0 or global_batch_size < 1:
            raise ValueError(f"no batches of {global_batch_size} rows can be read from {count} rows")
        self.rows, self.global_batch_size, self.seed, self.repeat = rows, global_batch_size, seed, repeat
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def batch(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        """The rows of one data-parallel rank: a contiguous slice of global / dp_size rows of the global batch.

        Raises:
            ValueError: if the global batch does not divide over `dp_size` ranks.
        """
        if self.global_batch_size % dp_size:
            raise ValueError(
                f"a global batch of {self.global_batch_size} rows cannot be cut into {dp_size} slices"
            )
        share = self.global_batch_size // dp_size
        mine = range(dp_rank * share, (dp_rank + 1) * share)
        step = step % self.repeat if self.repeat else step
        if isinstance(self.rows, SyntheticCorpus):
            return Batch.of(torch.from_numpy(self.rows.rows(self.seed, step, mine)))
        return read_batch(self.rows, self.row_indices(step)[mine.start : mine.stop])

    def row_indices(self, step: int) -> NDArray[np.int64]:
        """Indices [global_batch_size] of the packed rows of global batch `step`, in order."""
        assert not isinstance(self.rows, SyntheticCorpus)
        position, end = step * self.global_batch_size, (step + 1) * self.global_batch_size
        taken = []
        while position < end:
            epoch, start = divmod(position, len(self.rows))
            taken.append(self._permutation(epoch, len(self.rows))[start : start + end - position])
            position += len(taken[-1])
        return np.concatenate(taken)

    def _permutation(self, epoch: int, count: int) -> NDArray[np.int64]:
        if epoch != self._epoch:  # drawing it takes some 35 ms per million rows: kept for the epoch
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(count)
        return self._order


def eval_batches(
    rows: NDArray[np.integer], count: int, batch_size: int, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[Batch]:
    """The same `count` rows at every evaluation, evenly spaced over `rows`; all of them, if there are fewer.

    Every rank gets equally many batches of equal shape, since a forward may be collective. Where the count
    does not divide, the last batches are padded with rows whose targets are all `IGNORE_INDEX`.

    Args:
        rows: held-out rows [n, s + 1].
        count: rows to evaluate on, over all ranks.
        batch_size: rows that a rank takes at once.

    Yields:
        Batches of batch_size rows: the tokens that count are `(targets != IGNORE_INDEX).sum()`.
    """
    count = min(count, len(rows))
    chosen = np.arange(count) * len(rows) // max(count, 1)
    for start in range(0, count, batch_size * dp_size):
        mine = chosen[start + dp_rank * batch_size : start + (dp_rank + 1) * batch_size]
        batch = read_batch(rows, np.concatenate([mine, np.full(batch_size - len(mine), chosen[0])]))
        batch.targets[len(mine) :] = IGNORE_INDEX
        yield batch


def read_batch(rows: NDArray[np.integer], indices: NDArray[np.int64]) -> Batch:
    """The rows of these indices [b], copied out of the memory map."""
    return Batch.of(torch.from_numpy(rows[indices].astype(np.int64)))
