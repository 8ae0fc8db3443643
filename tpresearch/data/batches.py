"""Which rows each step reads: a pure function of (seed, step), that no plan, mesh or restart can change."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from tpresearch.data.synthetic import AnyCorpus, Synthetic


class Batches:
    """The endless sequence of global batches over `rows`.

    Each epoch e is its own permutation, `default_rng([seed, e]).permutation(n)`; the epochs are laid end to
    end and step k (from 0) takes the k-th `global_batch_size` of them. A batch may span the end of an epoch,
    so that no row is ever dropped, and within an epoch no row is read twice. There is no state to save:
    resuming is knowing the step.

    Args:
        rows: packed rows [n, s + 1], any integer dtype.
        global_batch_size: rows an optimizer step, over all ranks and accumulation.
        seed: chooses the order.
    """

    def __init__(self, rows: NDArray[np.integer], global_batch_size: int, seed: int) -> None:
        if len(rows) == 0 or global_batch_size < 1:
            raise ValueError(f"no batches of {global_batch_size} rows can be read from {len(rows)} rows")
        self.rows, self.global_batch_size, self.seed = rows, global_batch_size, seed
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def rows_of(self, step: int) -> NDArray[np.int64]:
        """Indices [global_batch_size] of the rows of global batch `step`, in order."""
        position, end = step * self.global_batch_size, (step + 1) * self.global_batch_size
        taken = []
        while position < end:
            epoch, start = divmod(position, len(self.rows))
            taken.append(self._permutation(epoch)[start : start + end - position])
            position += len(taken[-1])
        return np.concatenate(taken)

    def batch(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> torch.Tensor:
        """The rows of one data-parallel rank: a contiguous slice [global / dp_size, s + 1] of it, int64.

        Raises:
            ValueError: where the global batch does not divide over `dp_size` ranks.
        """
        return gather(self.rows, self.rows_of(step)[part_of(self.global_batch_size, dp_rank, dp_size)])

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if epoch != self._epoch:  # drawing it takes some 35 ms a million rows: kept for the epoch
            self._epoch, self._order = (
                epoch,
                np.random.default_rng([self.seed, epoch]).permutation(len(self.rows)),
            )
        return self._order


class DrawnBatches:
    """The endless sequence of global batches of a synthetic source: row i of step k is drawn by (seed, k, i)."""

    def __init__(self, rows: Synthetic, global_batch_size: int, seed: int) -> None:
        self.rows, self.global_batch_size, self.seed = rows, global_batch_size, seed

    def batch(self, step: int, dp_rank: int = 0, dp_size: int = 1) -> torch.Tensor:
        """The rows of one data-parallel rank: [global / dp_size, width] float32, or [global / dp_size, s + 1] int64.

        Raises:
            ValueError: where the global batch does not divide over `dp_size` ranks.
        """
        mine = range(self.global_batch_size)[part_of(self.global_batch_size, dp_rank, dp_size)]
        return torch.from_numpy(np.stack([self.rows.draw(self.seed, step, row) for row in mine]))


def batches_of(corpus: AnyCorpus, global_batch_size: int, seed: int) -> Batches | DrawnBatches:
    """The global batches of a corpus, packed or synthetic."""
    if isinstance(corpus, Synthetic):
        return DrawnBatches(corpus, global_batch_size, seed)
    return Batches(corpus.train, global_batch_size, seed)


def part_of(global_batch_size: int, dp_rank: int, dp_size: int) -> slice:
    """Which rows of a global batch a data-parallel rank reads.

    Raises:
        ValueError: where the global batch does not divide over `dp_size` ranks.
    """
    if global_batch_size % dp_size:
        raise ValueError(f"a global batch of {global_batch_size} rows cannot be cut into {dp_size} slices")
    share = global_batch_size // dp_size
    return slice(dp_rank * share, (dp_rank + 1) * share)


def eval_batches(
    rows: NDArray[np.integer], count: int, batch_size: int, dp_rank: int = 0, dp_size: int = 1
) -> Iterator[tuple[torch.Tensor, int]]:
    """The same `count` rows at every evaluation, evenly spaced over `rows`; all of them, if there are fewer.

    Every rank gets equally many batches of equal shape, since a forward may be collective. Where the count
    does not divide, the last batches are filled up with rows that do not count.

    Args:
        rows: held-out rows [n, s + 1].
        count: rows to evaluate on, over all ranks.
        batch_size: rows a rank takes at once.

    Yields:
        The batch [batch_size, s + 1], int64, and how many of its leading rows count (0 to batch_size).
    """
    count = min(count, len(rows))
    chosen = np.arange(count) * len(rows) // max(count, 1)
    for start in range(0, count, batch_size * dp_size):
        mine = chosen[start + dp_rank * batch_size : start + (dp_rank + 1) * batch_size]
        filled = np.concatenate([mine, np.full(batch_size - len(mine), chosen[0])])
        yield gather(rows, filled), len(mine)


def gather(rows: NDArray[np.integer], indices: NDArray[np.int64]) -> torch.Tensor:
    """Rows [b, s + 1] as int64, copied out of the memory map."""
    return torch.from_numpy(rows[indices].astype(np.int64))
