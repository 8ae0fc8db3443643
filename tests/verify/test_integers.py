"""Sharded matmuls on integers: bitwise equal under every plan; and a wrong one is far from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.composed import config
from support.marks import exhaustive
from support.nets import Frozen
from support.nets import model as twisted
from torch import Tensor, nn
from torch.distributed.tensor import Partial
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from tpresearch.config import Config
from tpresearch.config.world import World
from tpresearch.models.toy_mlp import ToyLM
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.weights import set_parameter
from tpresearch.plan.rules import ResolvedRule
from tpresearch.verify import integers
from tpresearch.verify.integers import IntegerResult, _max_difference, check_matmuls, max_over_ranks
from tpresearch.verify.ranks import Ranks

PLANS = [
    (1, ["parallel=none"]),
    (2, ["parallel=ddp"]),
    (2, ["parallel=tp"]),
    (2, ["parallel=sp"]),
    (2, ["parallel=fsdp"]),
    (4, ["parallel=fsdp_tp"]),
    (4, ["parallel=hsdp_tp", "train.dtype=float64"]),
    (4, ["parallel=fsdp_tp", "train.dtype=bfloat16"]),
    (4, ["parallel=hsdp_tp", "train.dtype=bfloat16"]),
    (4, ["parallel=tp", "model.vocab_size=263"]),
    (2, ["parallel=tp", "parallel.loss_parallel=false"]),
]
RARELY = (["parallel=hsdp_tp", "train.dtype=bfloat16"],)
"""Every day others have the plan, and the dtype."""


@pytest.mark.parametrize(
    ("size", "overrides", "model"),
    [
        (exhaustive if (nth + second) % 2 == 0 or overrides in RARELY else pytest.param)(
            size, overrides, model
        )
        for nth, (size, overrides) in enumerate(PLANS)
        for second, model in enumerate(("toy_mlp", "llama2_debug"))
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else v,
)
def test_every_matmul_is_bitwise_equal(ranks: Ranks, size: int, overrides: list[str], model: str) -> None:
    found = max_over_ranks(ranks.run(size, check_matmuls, config(f"model={model}", *overrides)))
    assert {"toy_mlp": 4, "llama2_debug": 6}[model] <= len(found)
    assert [exact for exact in found if not exact.passed] == []


def test_rows_of_each_rank_s_own_are_bitwise_equal_too(ranks: Ranks) -> None:
    found = max_over_ranks(ranks.run(4, check_matmuls, config("experiment=seed_sp", small=False)))
    assert [exact.rule for exact in found] == ["in_proj (colwise)", "out_proj (rowwise)"]
    assert all(exact.passed for exact in found)


def unsummed(world: World, cfg: Config) -> list[IntegerResult]:
    """The row-wise layers hand on their part of the sum as if it were the sum."""
    style = ResolvedRule.style

    def broken(self: ResolvedRule) -> ParallelStyle:
        layouts = {"input_layouts": self.src[0], "output_layouts": Partial()}
        return RowwiseParallel(**layouts) if self.name == "out_proj" else style(self)

    ResolvedRule.style = broken
    try:
        return check_matmuls(world, cfg)
    finally:
        ResolvedRule.style = style


def test_a_sum_that_is_left_out_is_seen(ranks: Ranks) -> None:
    found = max_over_ranks(ranks.run(2, unsummed, config("model=toy_mlp", "parallel=tp")))
    assert [exact.layer for exact in found if not exact.passed] == ["mlp.out_proj"]
    wrong = next(exact for exact in found if not exact.passed)
    assert wrong.output >= 1  # integers differ by integers
    assert wrong.input_gradient == wrong.weight_gradient == 0  # the forward alone is wrong


NUMBERS = {"output", "input_gradient", "weight_gradient"}


def doubled_input_gradients(*args: Any) -> nn.Module:
    model = parallelize(*args)

    def double(layer: nn.Module, args: tuple[Tensor]) -> Tensor:
        x = args[0].clone()
        x.register_hook(lambda gradient: 2 * gradient)
        return x

    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_pre_hook(double)
    return model


def doubled_weight_gradients(parameter: Tensor, full: Tensor) -> None:
    """But not those of biases."""
    set_parameter(parameter, full)
    if parameter.dim() == 2:
        parameter.register_hook(lambda gradient: 2 * gradient)


@pytest.mark.parametrize(
    ("quantity", "name", "fault", "layers"),
    [
        ("input_gradient", "parallelize", doubled_input_gradients, 3),
        ("weight_gradient", "set_parameter", doubled_weight_gradients, 4),
    ],
)
def test_a_gradient_that_is_doubled_is_seen(
    monkeypatch: pytest.MonkeyPatch, quantity: str, name: str, fault: Callable[..., Any], layers: int
) -> None:
    monkeypatch.setattr(integers, name, fault)
    found = check_matmuls(World(), config("model=toy_mlp", "parallel=none"))
    assert sum(getattr(exact, quantity) >= 1 for exact in found) == layers
    assert {getattr(exact, right) for exact in found for right in NUMBERS - {quantity}} == {0}


@pytest.mark.parametrize("number", sorted(NUMBERS))
def test_one_rank_is_enough_to_fail(number: str) -> None:
    right = IntegerResult("a", "", 0, 0, 0)
    other: dict[str, Any] = {number: 2}
    wrong = dataclasses.replace(right, **other)
    assert max_over_ranks([[right, right], [wrong, right]]) == [wrong, right]
    assert (wrong.passed, right.passed) == (False, True)


class Thirds(nn.Linear):
    """No plain matmul: thirds of integers are rounded."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 3


class Divided(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.output = Thirds(dim, vocab_size, bias=False)


@pytest.mark.parametrize(
    ("overrides", "layers"),
    [
        (["model=toy_mlp", "tokenizer.vocab_size=4096"], 4),  # in whose sums dense integers would round
        (twisted(Frozen), 4),
        (twisted(Divided), 3),
    ],
    ids=["long rows", "frozen", "not plain"],
)
def test_right_layers_pass_in_bfloat16(overrides: list[str], layers: int) -> None:
    found = check_matmuls(World(), config("parallel=none", "train.dtype=bfloat16", *overrides))
    assert [exact for exact in found if not exact.passed] == []
    assert len(found) == layers


def test_nan_differs_from_every_integer() -> None:
    assert _max_difference(torch.tensor([0.0, torch.nan]), torch.zeros(2)) == torch.inf
