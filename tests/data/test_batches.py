"""Law 1: what a step reads depends on the seed and the step, and on nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig
from tpresearch.data.batches import IGNORE_INDEX, Batch, Batches, eval_batches, meta_batch
from tpresearch.data.pipeline import prepare


@pytest.fixture
def rows() -> np.ndarray:
    """100 rows of 5 tokens; row i starts with i."""
    return (np.arange(100)[:, None] + 1000 * np.arange(5)).astype(np.uint16)


@pytest.mark.parametrize(("seed", "size"), [(7, 24), (0, 24), (7, 250)])
def test_the_order_is_the_one_that_is_documented(rows: np.ndarray, seed: int, size: int) -> None:
    """Each epoch is a permutation; a batch may span its end, or be larger; and to resume, the step is enough."""
    batches = Batches(rows, size, seed)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(100) for epoch in range(30)])
    for step in (9, *range(12), 2):
        np.testing.assert_array_equal(batches.row_indices(step), order[size * step : size * (step + 1)])


@pytest.mark.parametrize("dp_size", [1, 2, 3, 4])
def test_every_dp_degree_reads_the_same_global_batch(rows: np.ndarray, dp_size: int) -> None:
    for step in (0, 4, 41):
        whole = Batches(rows, 24, seed=1).batch(step)
        slices = [Batches(rows, 24, seed=1).batch(step, rank, dp_size) for rank in range(dp_size)]
        assert {part.shape for piece in slices for part in piece} == {(24 // dp_size, 4)}
        for parts, part in zip(zip(*slices, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(parts), part)
            assert part.dtype == torch.int64
        taken = Batches(rows, 24, seed=1).row_indices(step)
        assert whole.inputs.tolist() == rows[taken, :-1].tolist()
        assert whole.targets.tolist() == rows[taken, 1:].tolist()


def test_a_batch_may_be_a_single_row(rows: np.ndarray) -> None:
    assert (
        Batches(rows, 1, seed=0).batch(2).inputs.tolist()
        == rows[[Batches(rows, 3, seed=0).row_indices(0)[2]], :-1].tolist()
    )


def test_repeated_batches_are_the_first_ones_over_and_over(rows: np.ndarray) -> None:
    all_of_them, two = Batches(rows, 24, seed=3), Batches(rows, 24, seed=3, repeat=2)
    for step in (0, 1, 2, 7, 100):
        assert torch.equal(two.batch(step, 1, 2).inputs, all_of_them.batch(step % 2, 1, 2).inputs)


def test_an_impossible_cut_is_refused(rows: np.ndarray) -> None:
    with pytest.raises(ValueError, match="24 rows cannot be cut into 5 slices"):
        Batches(rows, 24, seed=0).batch(0, 0, 5)
    with pytest.raises(ValueError, match="from 0 rows"):
        Batches(rows[:0], 24, seed=0)
    with pytest.raises(ValueError, match="no batches of 0 rows"):
        Batches(rows, 0, seed=0)


@pytest.mark.parametrize(
    ("count", "dp_size", "batch_size"), [(96, 1, 8), (96, 4, 8), (97, 3, 4), (5, 4, 8), (500, 2, 7)]
)
def test_every_evaluation_reads_the_same_rows_whatever_the_mesh(
    rows: np.ndarray, count: int, dp_size: int, batch_size: int
) -> None:
    ranks = [list(eval_batches(rows, count, batch_size, rank, dp_size)) for rank in range(dp_size)]
    assert len({len(batches) for batches in ranks}) == 1, "a rank without a batch would hang the others"
    batches = [batch for mine in ranks for batch in mine]
    assert {part.shape for batch in batches for part in batch} == {(batch_size, 4)}
    counted = []
    for inputs, targets in batches:
        counts = (targets != IGNORE_INDEX).all(1)
        assert (targets[~counts] == IGNORE_INDEX).all(), "a row that fills up a batch counts in part"
        assert ((inputs < 100).sum(1) == 1).all(), "ignoring targets changed the inputs"
        assert torch.equal(targets[counts], inputs[counts] + 1000)
        counted += inputs[counts, 0].tolist()
    expected = min(count, 100)
    assert sorted(counted) == [index * 100 // expected for index in range(expected)]


def test_no_held_out_rows_give_no_batches(rows: np.ndarray) -> None:
    assert list(eval_batches(rows[:0], 96, 8)) == []


def test_micro_batches_are_the_batch_in_order(rows: np.ndarray) -> None:
    batch = Batches(rows, 24, seed=1).batch(0)
    pieces = batch.split(7)
    assert [len(piece.inputs) for piece in pieces] == [7, 7, 7, 3]
    assert torch.equal(torch.cat([piece.inputs for piece in pieces]), batch.inputs)
    assert torch.equal(torch.cat([piece.targets for piece in pieces]), batch.targets)


def test_numbers_are_of_the_dtype_of_the_computation_and_tokens_stay_whole() -> None:
    cpu, narrow = torch.device("cpu"), torch.bfloat16
    numbers, tokens = (Batch.of(torch.ones(2, 3, dtype=kind)) for kind in (torch.float32, torch.int64))
    dtypes = [[part.dtype for part in batch.to(cpu, narrow)] for batch in (numbers, tokens)]
    assert dtypes == [[narrow, torch.float32], [torch.int64, torch.int64]]
    assert numbers.to(cpu).inputs.dtype == torch.float32


@pytest.mark.parametrize(
    ("source", "path"), [("uniform", None), ("random_tokens", None), ("text", "one.txt")]
)
def test_the_meta_batch_is_the_shape_of_a_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, path: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("some text " * 100)
    data = DataConfig(DataSource(source), path, seq_len=6, width=5, cache_dir="cache")
    real = Batches(prepare(data, TokenizerConfig(vocab_size=257)), 3, 0).batch(0)
    for part, meta in zip(real, meta_batch(data, 3), strict=True):
        assert meta.is_meta
        assert (meta.shape, meta.dtype) == (part.shape, part.dtype)
