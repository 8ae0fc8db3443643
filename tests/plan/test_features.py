"""A layer whose output the model needs whole cannot be split by its features, or the sequence: refused where that can be seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from support.assembled import planned, refusal
from support.nets import model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tpresearch.models.toy_mlp import ToyLM
from tpresearch.plan.features import DimUse


class Gated(nn.Module):
    """Gate and up in one layer, whose first half is the gate."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(dim, 2 * hidden_dim), nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = torch.tanh(self.in_proj(x)).chunk(2, -1)
        return self.out_proj(gate * up)


class GatedLM(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.set_submodule("mlp", Gated(dim, hidden_dim))


ACROSS: dict[str, Callable[[Tensor], object]] = {
    "softmax": lambda x: x.relu().softmax(-1),
    "mean": lambda x: x.square().mean(-1, keepdim=True),
    "native_layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "slice": lambda x: x[..., ::2],
    "split": lambda x: x.chunk(2, -1),
    "split_with_sizes": lambda x: x.split([2, 6], -1),
    "linalg_vector_norm": lambda x: x.norm(dim=-1),
    "sum": lambda x: (x * 2).sum(),
    "cumsum": lambda x: x.cumsum(-1),
    "max": lambda x: x.max(-1),
    "select": lambda x: x[..., 0],
    "unbind": lambda x: x.unbind(-1),
    "constant_pad_nd": lambda x: F.pad(x.mT, (0, 0, 0, 1)),
}
APART: dict[str, Callable[[Tensor], object]] = {
    "heads": lambda x: x.unflatten(-1, (2, 4)).softmax(-1),
    "tokens": lambda x: x.cumsum(1) + x.mean(1, keepdim=True),
    "whole": lambda x: (x[..., :], x[:, :2], x.split(8, -1), x[0].relu()),
    "a product": lambda x: (x @ x.new_ones(8, 3)).softmax(-1),
}


class Noting(TorchDispatchMode):
    def __init__(self, found: DimUse) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self._found.note("mixer", func, args, kwargs or {}, output)
        return output


@pytest.mark.parametrize("name", [*ACROSS, *APART])
def test_what_needs_all_features_is_known(name: str) -> None:
    found, x = DimUse(-1), torch.ones(2, 4, 8)
    found.made("layer", x)
    with Noting(found):
        (ACROSS | APART)[name](x)
    assert found.across == ({"layer": {"mixer": name}} if name in ACROSS else {})


def test_a_layer_that_is_split_in_halves_is_refused_where_its_features_are_sharded() -> None:
    error = refusal(*model(GatedLM), "parallel=tp")
    assert str(error).startswith("model.plans.tp.in_proj.dst=shard:-1: split needs all")
    whole = [f"{key}={value}" for key, value in error.fix.items()]
    planned(*model(GatedLM), "parallel=tp", *whole, "model.plans.tp.out_proj.src=replicate")
    planned(*model(GatedLM), "parallel=fsdp")


OVER_POSITIONS: dict[str, Callable[[Tensor], object]] = {
    "slice": lambda x: F.pad(x.relu()[:, :-1], (0, 0, 1, 0)),
    "constant_pad_nd": lambda x: F.conv1d(F.pad(x.mT, (3, 0)), x.new_ones(8, 1, 4), groups=8),
    "convolution": lambda x: F.conv1d(x.permute(0, 2, 1), x.new_ones(8, 1, 4), padding=3, groups=8),
    "mean": lambda x: x - x.mean(1, keepdim=True),
    "cumsum": lambda x: (2 * x).cumsum(-2),
    "roll": lambda x: x.roll(1, 1),
    "select": lambda x: x[:, -1],
}
OF_EACH_POSITION: dict[str, Callable[[Tensor], object]] = {
    "features": lambda x: x.softmax(-1) + x.mean(-1, keepdim=True) + F.pad(x[..., 1:], (0, 1)),
    "rows": lambda x: x[:1] - x.mean(0),
    "by one": lambda x: F.conv1d(x.mT, x.new_ones(3, 8, 1)),
}


@pytest.mark.parametrize("name", [*OVER_POSITIONS, *OF_EACH_POSITION])
def test_what_needs_all_positions_is_known(name: str) -> None:
    found, x = DimUse(1), torch.ones(2, 4, 8)
    found.made("layer", x)
    with Noting(found):
        (OVER_POSITIONS | OF_EACH_POSITION)[name](x)
    assert found.across == ({"layer": {"mixer": name}} if name in OVER_POSITIONS else {})


class TokenShift(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.pad(x[:, :-1], (0, 0, 1, 0))


class Shifted(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.shift = TokenShift()

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return self.output(self.mlp(self.shift(self.embed(tokens))))


def test_what_works_across_positions_is_refused_where_a_rank_has_a_part_of_them() -> None:
    error = refusal(*model(Shifted), "parallel=fsdp_tp")
    assert str(error).startswith(
        "model.plans.sp.embed.dst=shard:1: slice in shift needs all positions of the output of embed"
    )
    planned(*model(Shifted), "parallel=fsdp_tp", *(f"{key}={value}" for key, value in error.fix.items()))
    planned(*model(Shifted), "parallel=fsdp_tp", "mesh.tp=1")
    gathers = "{match: shift, style: input, src: ['shard:1'], dst: [replicate]}"
    planned(*model(Shifted), "parallel=sp", f"+model.plans.sp.shift={gathers}")


class Heads(nn.Module):
    """Attention with heads in a dim of their own, made in one of several ways."""

    WAYS: ClassVar[dict[str, Callable[[Tensor, int], Tensor]]] = {
        "as many heads": lambda x, n: x.view(*x.shape[:2], n, -1),
        "as many heads, as einops": lambda x, n: x.relu().reshape(*x.shape[:2], n, x.shape[2] // n),
        "as many heads by unflatten": lambda x, n: x.unflatten(-1, (n, -1)),
        "one head": lambda x, n: x.view(*x.shape[:2], 1, -1),
        "as wide heads": lambda x, n: x.view(*x.shape[:2], -1, 16 // n),
        "as many as fit": lambda x, n: x.view(*x.shape[:2], x.shape[2] // (16 // n), -1),
    }

    def __init__(self, dim: int, way: str) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(dim, 16), nn.Linear(16, dim)
        self._split = self.WAYS[way]

    def forward(self, x: Tensor) -> Tensor:
        heads = self._split(self.in_proj(x), 4).transpose(1, 2)
        return self.out_proj(F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2))


class HeadsLM(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int, way: str) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.set_submodule("mlp", Heads(dim, way))


@pytest.mark.parametrize("way", Heads.WAYS)
def test_heads_that_a_shard_makes_narrower_are_refused(way: str) -> None:
    job = (*model(HeadsLM), f"+model.way='{way}'")
    planned(*job, "parallel=fsdp")
    if "as many heads" not in way and way != "one head":
        planned(*job, "parallel=tp")
    else:
        whole, shard = (16, 4) if way == "one head" else (4, 1)
        sentence = (
            f"of mlp.in_proj into heads of {whole} features, and one of 4 ranks' shards into heads of {shard}"
        )
        assert sentence in str(refusal(*job, "parallel=tp"))
