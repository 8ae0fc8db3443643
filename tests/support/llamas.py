"""The model of a Hugging Face folder in this process, and how far it is from theirs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from support.composed import config
from tpresearch.config.schema import Config
from tpresearch.hf.files import settings_of
from tpresearch.hf.read import from_hugging_face
from tpresearch.parallel.weights import materialize
from tpresearch.plan.meta import meta_model, weight_dtype

CPU = torch.device("cpu")
MakeLlama = Callable[..., Path]


def configured(folder: Path | str, *overrides: str) -> Config:
    """A config with the model that a folder, or a hub id, describes."""
    cfg = _composed(*overrides)
    model = dataclasses.replace(cfg.model, args=settings_of(str(folder)))
    return dataclasses.replace(cfg, model=model)


@functools.cache
def _composed(*overrides: str) -> Config:
    return config("tokenizer.vocab_size=263", *overrides)


def imported(folder: Path | str, *overrides: str) -> nn.Module:
    """The model of a folder in this process, with its weights."""
    cfg = configured(folder, *overrides)
    model = meta_model(cfg.model, weight_dtype(cfg.train))
    state = torch.get_rng_state()
    materialize(model, CPU, from_hugging_face(str(folder), cfg.model))
    assert torch.equal(torch.get_rng_state(), state), "weights that are read are not drawn"
    return model


def relative_difference(ours: nn.Module, theirs: nn.Module) -> float:
    """Greatest difference of the logits of a few rows, relative to their own size."""
    tokens = torch.randint(0, 263, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = ours(tokens), theirs(tokens).logits
    return float((found - expected).abs().max() / expected.abs().max())
