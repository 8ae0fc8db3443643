"""Learning rates by hand, which parameters decay, and which gradients are clipped."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from support.assembled import assembled, ranks_of_a_host
from support.composed import config
from support.counted_steps import FAKE
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.config import ConfigError
from tpresearch.config.choices import OptimizerName, ScheduleName
from tpresearch.config.training import OptimizerConfig, ScheduleConfig
from tpresearch.train.optim import AdamW, build_optimizer, divide_gradients, learning_rate
from tpresearch.train.state import TrainState
from tpresearch.train.step import clip_gradients, update


def rates(name: str, **settings: float) -> list[float]:
    schedule = ScheduleConfig(name=ScheduleName(name), warmup_steps=4, **settings)
    return [learning_rate(step, 20, 2.0, schedule) for step in range(20)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert rates("constant")[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates("constant")[-1] == 2.0


def test_cosine_falls_by_half_at_its_middle() -> None:
    found = rates("cosine", min_lr_ratio=0.1)
    assert found[4] == 2.0
    assert found[12] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert found[19] == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * 15 / 16))))


def test_wsd_is_level_and_then_falls_in_a_line() -> None:
    found = rates("wsd", decay_ratio=0.25, min_lr_ratio=0.0)
    assert found[4:16] == [2.0] * 12
    assert found[16:] == pytest.approx([1.6, 1.2, 0.8, 0.4])
    assert (
        rates("wsd", decay_ratio=0.05, min_lr_ratio=0.0)[4:] == [2.0] * 16
    )  # its last step is the whole of the decay


def test_wsd_that_begins_within_the_warmup_falls_from_the_peak_after_it() -> None:
    found = rates("wsd", decay_ratio=0.9, min_lr_ratio=0.0)
    assert found[2:6] == pytest.approx([1.5, 2.0, 2.0, 2.0 * 15 / 16])
    assert found[19] == pytest.approx(2.0 / 16)


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd"])
def test_steps_after_the_last_have_its_learning_rate_or_less(name: str) -> None:
    schedule = ScheduleConfig(name=ScheduleName(name), min_lr_ratio=0.1)
    last, *later = (learning_rate(step, 20, 2.0, schedule) for step in (20, 21, 30, 400))
    assert later == [last] * 3
    assert last == pytest.approx(2.0 if name == "constant" else 0.2)


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0, 10, 1.0, ScheduleConfig(warmup_steps=0)) == 1.0


@pytest.mark.parametrize(("vectors", "decays"), [(False, {(2,): 0.1, (1,): 0.0}), (True, {(2, 1): 0.1})])
def test_matrices_decay_and_vectors_where_that_is_asked_for(
    vectors: bool, decays: dict[tuple[int, ...], float]
) -> None:
    ours = OptimizerConfig(weight_decay=0.1, decay_vectors=vectors)
    groups = build_optimizer(nn.Linear(3, 4).parameters(), ours).param_groups
    assert {tuple(p.dim() for p in group["params"]): group["weight_decay"] for group in groups} == decays


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_divided_in_the_update_are_those_divided_before_it(dtype: torch.dtype) -> None:
    """To rounding: to what a clipping factor of six digits and one multiplication more come to. Each step has another divisor,
    since AdamW moves alike by gradients that are all divided by the same."""
    moved = []
    for in_update in (True, False):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.zeros(300, dtype=dtype))
        optimizer = build_optimizer([weight], OptimizerConfig(lr=0.01))
        for divisor in (7.3, 1.0, 2.9):
            weight.grad = torch.randn(300, dtype=dtype)
            if in_update:
                divide_gradients(optimizer, [weight.grad], torch.tensor(divisor))
            else:
                weight.grad = (weight.grad.float() / divisor).to(dtype)
            optimizer.step()
        moved.append(weight.detach())
    assert torch.allclose(*moved, rtol=0, atol=1e-6 if dtype is torch.float32 else 1e-3)


def test_in_bfloat16_the_factor_is_not_rounded_before_it_is_used() -> None:
    """1000 / 1.0035 is 996.5, which bfloat16 has as 996; by a divisor of three digits, 1.0, it would stay 1000."""
    gradient = torch.full((3,), 1000.0, dtype=torch.bfloat16)
    optimizer = build_optimizer([nn.Parameter(gradient.clone())], OptimizerConfig(name=OptimizerName.sgd))
    divide_gradients(optimizer, [gradient], torch.tensor(1.0035))
    assert gradient.tolist() == [(torch.tensor(1000.0) / 1.0035).bfloat16().item()] * 3


@pytest.mark.parametrize(("most", "left"), [(2.5, 0.5), (10.0, 1.0), (None, 1.0)])
def test_clipping_makes_no_gradient_larger(most: float | None, left: float) -> None:
    """Nor does it touch one below the maximum, where those of a step in verify are above."""
    model, only_cpu = nn.Linear(2, 1, bias=False).double(), SimpleNamespace(device_type="cpu")
    model.weight.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    state = TrainState(0, model, build_optimizer(model.parameters(), OptimizerConfig()))
    assert clip_gradients(state, cast(DeviceMesh, only_cpu), most) == 5.0
    assert model.weight.grad.tolist() == [pytest.approx([3.0 * left, 4.0 * left], rel=1e-6)]


def test_an_update_that_is_left_out_leaves_everything_as_it_was() -> None:
    weight = nn.Parameter(torch.ones(5))
    optimizer = build_optimizer([weight], OptimizerConfig())
    assert isinstance(optimizer, AdamW)
    before = []
    for skipped in (0.0, 1.0):
        weight.grad = torch.full((5,), torch.inf if skipped else 1.0)
        optimizer.found_inf = torch.tensor(skipped)
        optimizer.step()
        state = optimizer.state[weight]
        before.append(
            [weight.detach().clone(), *(state[key].clone() for key in ("exp_avg", "exp_avg_sq", "step"))]
        )
    assert all(torch.equal(a, b) for a, b in zip(*before, strict=True))


def test_sgd_leaves_out_the_updates_whose_norm_is_not_finite_and_no_others() -> None:
    with assembled(
        config("model=toy_mlp", "parallel=none", "optimizer=sgd", "train.on_nonfinite=skip")
    ) as loop:
        state = loop.state
        weight = next(state.model.parameters())
        for norm, moves in ((torch.inf, False), (torch.nan, False), (3.0, True)):
            before, weight.grad = weight.detach().clone(), torch.ones_like(weight)
            update(state, torch.tensor(norm), loop.setup)
            assert torch.equal(weight, before) is not moves
            assert weight.grad is None


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.Adafactor, {}),
        (torch.optim.Rprop, {}),
        (torch.optim.SGD, {"fused": True}),
        (torch.optim.RMSprop, {"foreach": True}),
    ],
)
def test_an_optimizer_of_ones_own_that_takes_no_shards_is_refused(
    kind: Callable[..., torch.optim.Optimizer], settings: dict[str, bool]
) -> None:
    with assembled(config("model=llama2_debug", "parallel=tp"), ranks_of_a_host(2), FAKE) as loop:
        loop.state.optimizer = kind(loop.state.trained_parameters().values(), **settings)
        why = (
            rf"^optimizer={kind.__name__}: torch cannot take its step on the sharded weights of parallel=tp; "
        )
        with pytest.raises(ConfigError, match=why):
            loop.step()
