"""Synthetic rows: a pure function of (seed, step, row), whatever the mesh, and of what the config says."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from support.composed import config

from tpresearch.config.schema import DataSource
from tpresearch.data.batches import Batches
from tpresearch.data.pipeline import prepare
from tpresearch.data.rows import SyntheticCorpus

NUMBERS = SyntheticCorpus(DataSource.uniform, 10, None)
TOKENS = SyntheticCorpus(DataSource.random_tokens, 17, 300)
BOTH = pytest.mark.parametrize("source", [NUMBERS, TOKENS], ids=["uniform", "random_tokens"])


@BOTH
@pytest.mark.parametrize("dp_size", [2, 3, 6])
def test_ranks_read_the_slices_of_one_global_batch(source: SyntheticCorpus, dp_size: int) -> None:
    for step in (0, 5):
        whole = Batches(source, 12, seed=3).batch(step)
        slices = [Batches(source, 12, seed=3).batch(step, rank, dp_size) for rank in range(dp_size)]
        for parts, part in zip(zip(*slices, strict=True), whole, strict=True):
            assert torch.equal(torch.cat(parts), part)


def test_a_row_is_drawn_by_seed_step_and_row() -> None:
    drawn = [np.random.default_rng([3, 4, row]).integers(300, size=17) for row in range(8)]
    inputs, targets = Batches(TOKENS, 8, 3).batch(4)
    assert (inputs.tolist(), targets.tolist()) == (
        np.stack(drawn)[:, :-1].tolist(),
        np.stack(drawn)[:, 1:].tolist(),
    )


@BOTH
def test_a_larger_batch_begins_with_the_rows_of_a_smaller_one(source: SyntheticCorpus) -> None:
    larger, smaller = Batches(source, 12, 3).batch(4), Batches(source, 8, 3).batch(4)
    assert torch.equal(larger.inputs[:8], smaller.inputs)


@BOTH
def test_no_two_rows_are_the_same_over_steps_and_seeds(source: SyntheticCorpus) -> None:
    rows = [Batches(source, 8, seed).batch(step).inputs for seed in range(4) for step in range(8)]
    assert len(torch.cat(rows).unique(dim=0)) == 4 * 8 * 8


def test_numbers_are_uniform_and_tokens_fill_the_vocabulary() -> None:
    numbers, none = Batches(NUMBERS, 2000, 0).batch(0)
    assert none.shape == (2000, 0)
    assert (numbers.shape, numbers.dtype) == ((2000, 10), torch.float32)
    assert 0 <= numbers.min() < 1e-3 < 0.999 < numbers.max() < 1
    assert numbers.mean().item() == pytest.approx(0.5, abs=4 * math.sqrt(1 / 12 / 20_000))
    tokens, targets = Batches(TOKENS, 500, 0).batch(0)
    assert (tokens.shape, tokens.dtype) == ((500, 16), torch.int64)
    assert torch.equal(tokens[:, 1:], targets[:, :-1])
    assert tokens.unique().tolist() == list(range(300))


def test_the_config_says_how_wide_and_over_which_vocabulary() -> None:
    numbers = config("model=toy_net", "data=uniform", "model.dim=6", small=False)
    assert prepare(numbers.data, numbers.tokenizer) == SyntheticCorpus(DataSource.uniform, 6, None)
    tokens = config("data=random_tokens", "tokenizer=bpe_32k", "data.seq_len=256", small=False)
    source = prepare(tokens.data, tokens.tokenizer)
    assert source == SyntheticCorpus(DataSource.random_tokens, 257, 32000)
    assert source.unigram_entropy == pytest.approx(math.log(32000))
    assert str(source).startswith("rows of 257 random tokens below 32,000, ")
    assert str(NUMBERS).startswith("rows of 10 random floats, ")
    assert source.corpus_hash != dataclasses.replace(source, vocab_size=300).corpus_hash
    assert len(source.held_out) == 0
