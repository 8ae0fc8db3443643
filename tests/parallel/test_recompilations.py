"""Compiled blocks that differ by a number, and those that are given another shape each time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.assembled import assembled
from support.composed import config
from support.counted_steps import FAKE
from torch import Tensor, nn

from tpresearch.config import ConfigError
from tpresearch.parallel.apply import compiled

LAYERS = 10
"""More than torch compiles one function for unless told to."""


class Scaled(nn.Module):
    def __init__(self, dim: int, depth: int) -> None:
        super().__init__()
        self.linear, self.share = nn.Linear(dim, dim), 1 / (1 + depth)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.share * self.linear(x)


class Deep(nn.Module):
    """Whose blocks are scaled by their depth."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.embed, self.output = nn.Embedding(vocab_size, dim), nn.Linear(dim, vocab_size)
        self.layers = nn.ModuleList(Scaled(dim, depth) for depth in range(LAYERS))

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.output(hidden)


@pytest.fixture(autouse=True)
def _limited(own_graphs: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_(f, **(options | {"backend": "eager"}))
    )
    with torch._dynamo.config.patch(recompile_limit=8):
        yield


def loss_of(*words: str) -> float:
    model = "model=toy_mlp", f"model._target_={__name__}.Deep", "model.blocks=[layers.*]"
    cfg = config(*model, "parallel=none", "train.dtype=float64", *words)
    with assembled(cfg, device=FAKE) as loop:
        return [loop.step().loss.item() for _ in range(2)][1]


def test_blocks_that_differ_by_a_number_are_compiled_each() -> None:
    assert loss_of("parallel.compile=true") == pytest.approx(loss_of(), rel=1e-12)


def test_a_block_that_is_compiled_again_and_again_is_refused_in_a_sentence() -> None:
    forward = compiled(torch.tanh)
    for size in range(2, 10):
        forward(torch.ones(size))
    with pytest.raises(ConfigError, match=r"^parallel\.compile=true: a block was compiled 8 times") as no:
        forward(torch.ones(10))
    assert no.value.fix == {"parallel.compile": "false"}
