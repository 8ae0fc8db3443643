"""Configs as the command line composes them, and a corpus of random rows, for tests in this process and in ranks."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
from hydra import compose
from hydra.core.global_hydra import GlobalHydra

from tpresearch.config.compose import register_schema, to_config
from tpresearch.config.schema import Config
from tpresearch.config.validate import validate
from tpresearch.data.rows import PackedCorpus
from tpresearch.launch.composition import initialize_conf
from tpresearch.launch.resolvers import register_resolvers

VOCAB = 260
SEQ_LEN = 16
SMALL = (
    f"tokenizer.vocab_size={VOCAB}",
    f"data.seq_len={SEQ_LEN}",
    "train.global_batch_size=8",
    "logger=none",
)


def config(*overrides: str, small: bool = True, program: str = "train") -> Config:
    """A program's config with these overrides; `small` makes a batch 8 rows of 16 tokens."""
    register_schema()
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_conf():
        return to_config(compose(program, overrides=[*(SMALL if small else ()), *overrides]))


def corpus(rows: int = 64, seq_len: int = SEQ_LEN, vocab: int = VOCAB) -> PackedCorpus:
    """Random rows, the same in every process; the held-out ones are 11, which no batch size divides."""
    drawn = np.random.default_rng(7).integers(0, vocab, (rows + 11, seq_len + 1), dtype=np.uint16)
    return PackedCorpus(
        train=drawn[:rows],
        held_out=drawn[rows:],
        corpus_hash="random",
        tokenizer_hash="none",
        vocab_size=vocab,
        eos_id=0,
        unigram_entropy=math.log(vocab),
        meta={},
        folder=Path(),
    )


def in_two_parts(cfg: Config, size: int) -> Config:
    """The config with each data-parallel rank's rows in two micro-batches."""
    share = cfg.train.global_batch_size // validate(cfg, size).dp
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, micro_batch_size=share // 2))
