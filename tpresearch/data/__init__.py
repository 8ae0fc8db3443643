"""Corpus -> tokenizer -> packed rows -> deterministic batches.

Names are imported when first used: a missing path is refused before torch, datasets or tokenizers are loaded.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tpresearch.data.batches import IGNORED, Batch, Batches, batches_of, eval_batches, meta_batch
    from tpresearch.data.check import check_data
    from tpresearch.data.packed import PackedCorpus, check_enough_rows
    from tpresearch.data.pipeline import prepare
    from tpresearch.data.synthetic import AnyCorpus, Synthetic
    from tpresearch.data.tokenizer import tokenizer_size

__all__ = [
    "IGNORED",
    "AnyCorpus",
    "Batch",
    "Batches",
    "PackedCorpus",
    "Synthetic",
    "batches_of",
    "check_data",
    "check_enough_rows",
    "eval_batches",
    "meta_batch",
    "prepare",
    "tokenizer_size",
]

_HOME = {
    "AnyCorpus": "synthetic",
    "PackedCorpus": "packed",
    "Synthetic": "synthetic",
    "check_data": "check",
    "check_enough_rows": "packed",
    "prepare": "pipeline",
    "tokenizer_size": "tokenizer",
}
"""The module of each name; those left out are in batches."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME.get(name, 'batches')}"), name)
