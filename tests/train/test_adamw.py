"""AdamW in one pass of its own: against torch's fused kernel, the paper's algorithm, and itself compiled."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.assembled import assembled
from support.composed import config
from support.marks import exhaustive
from torch import Tensor, nn

from tpresearch.config.training import OptimizerConfig
from tpresearch.ledger.memory_formulas import expected_memory
from tpresearch.plan.meta import plain_model
from tpresearch.train import adamw
from tpresearch.train.adamw import AdamW, ElementwiseAdamW
from tpresearch.train.optim import build_optimizer

pytestmark = pytest.mark.usefixtures("own_graphs")

SHAPES = (64, 1024), (32, 1024), (1024,), (7, 13), (5,)
STEPS, SKIPPED, DIVISOR = 4, 2, 3.3
LR, BETAS, EPS, DECAY = 0.01, (0.9, 0.95), 1e-8, 0.1

Make = Callable[[list[dict[str, Any]]], AdamW]


def fused(groups: list[dict[str, Any]]) -> AdamW:
    return AdamW(groups, lr=LR, betas=BETAS, eps=EPS, fused=True)


def elementwise(
    groups: list[dict[str, Any]],
    moments: torch.dtype | None = None,
    compile: bool = False,
    copies: Any = (),
    remainders: Any = (),
) -> AdamW:
    beside = dict(copies), dict(remainders)
    return ElementwiseAdamW(groups, moments, compile, *beside, lr=LR, betas=BETAS, eps=EPS)


def draw(dtype: torch.dtype) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in SHAPES]


def train(weights: list[nn.Parameter], make: Make) -> dict[str, list[Tensor]]:
    """Weights and state after some steps, of which one is skipped, with gradients that are divided in the update."""
    groups = [{"params": weights[:2], "weight_decay": DECAY}, {"params": weights[2:], "weight_decay": 0.0}]
    optimizer = make(groups)
    for step in range(STEPS):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, dtype=torch.float64).to(weight.dtype)
        if weights[0].dtype is not torch.float64:  # torch's kernel takes none there
            optimizer.grad_scale = torch.tensor(DIVISOR)
            optimizer.found_inf = torch.tensor(float(step == SKIPPED))
        optimizer.step()
    states = [optimizer.state[weight] for weight in weights]
    found = {key: [state[key] for state in states] for key in ("step", "exp_avg", "exp_avg_sq")}
    return {"weight": [weight.detach() for weight in weights], **found}


@pytest.mark.parametrize(
    ("dtype", "compile"),
    [
        *((dtype, False) for dtype in (torch.float64, torch.float32, torch.bfloat16)),
        exhaustive(torch.float64, True),
        (torch.float32, True),
        (torch.bfloat16, True),
    ],
)
def test_it_is_the_fused_update_to_rounding(dtype: torch.dtype, compile: bool) -> None:
    theirs = train(draw(dtype), fused)
    ours = train(draw(dtype), functools.partial(elementwise, compile=compile))
    for key, expected in theirs.items():
        for a, b in zip(expected, ours[key], strict=True):
            assert a.dtype is b.dtype
            assert (a - b).abs().max() <= 2 * torch.finfo(dtype).eps * a.abs().max(), key


def test_moments_in_bfloat16_are_rounded_where_they_are_stored_and_nowhere_else() -> None:
    """Algorithm 2 of arXiv 1711.05101 by hand, in float64, with both moments rounded after each step."""
    (weight,) = weights = [nn.Parameter(torch.linspace(-1, 1, 2048).view(2, 1024))]
    optimizer = elementwise([{"params": weights, "weight_decay": DECAY}], torch.bfloat16)
    by_hand, mean, square = weight.detach().double(), torch.zeros(2, 1024), torch.zeros(2, 1024)
    torch.manual_seed(1)
    for step in range(1, STEPS + 1):
        weight.grad = torch.randn(2, 1024)
        g = weight.grad.double()
        m, v = (
            BETAS[0] * mean.double() + (1 - BETAS[0]) * g,
            BETAS[1] * square.double() + (1 - BETAS[1]) * g * g,
        )
        by_hand = by_hand * (1 - LR * DECAY) - LR * (m / (1 - BETAS[0] ** step)) / (
            (v / (1 - BETAS[1] ** step)).sqrt() + EPS
        )
        mean, square = m.bfloat16(), v.bfloat16()
        optimizer.step()
    found = optimizer.state[weight]
    assert found["exp_avg"].dtype is found["exp_avg_sq"].dtype is torch.bfloat16
    # A moment at the middle between two bfloat16 numbers may be rounded to either: a few of 2,048 are 0.4 % off.
    assert ((weight.detach() - by_hand).abs() < 1e-6).float().mean() > 0.99
    assert torch.allclose(weight.detach().double(), by_hand, atol=LR * 2**-7)


def test_compiled_it_is_one_graph_for_tensors_in_rows_and_one_for_others() -> None:
    torch._dynamo.utils.counters.clear()
    weights = [
        nn.Parameter(torch.ones(shape)) for shape in ((2, 1024), (9, 2048), (4, 512), (3,), (7, 7), (999,))
    ]
    train(weights, functools.partial(elementwise, compile=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize(
    ("dtypes", "limit"),
    [((torch.float32,), 3), exhaustive((torch.float64, torch.float32, torch.bfloat16), 8)],
)
def test_dynamo_counts_graphs_of_each_kind_of_update_by_itself(
    dtypes: tuple[torch.dtype, ...], limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its limit, 8, is for a code object: a process may train many times, and a model have weights of several dtypes.

    Two graphs of each kind, of which there are two per dtype.
    """
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", functools.partial(compile, backend="eager"))
    adamw._compiled_update.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=limit):
        for moments in (None, torch.bfloat16):
            for dtype in dtypes:
                train(draw(dtype), functools.partial(elementwise, compile=True, moments=moments))
    adamw._compiled_update.cache_clear()


@pytest.mark.parametrize("compile", [False, True])
def test_a_weight_that_is_not_contiguous_is_updated(compile: bool) -> None:
    weight, same = nn.Parameter(torch.ones(1024, 2).t()), nn.Parameter(torch.ones(2, 1024))
    assert not weight.is_contiguous()
    gradient = torch.randn(2, 1024, generator=torch.Generator().manual_seed(0))
    for parameter in (weight, same):
        optimizer = elementwise([{"params": [parameter]}], compile=compile and parameter is weight)
        parameter.grad = gradient.clone()
        optimizer.step()
    assert torch.equal(weight.detach(), same.detach())
    assert not torch.equal(same.detach(), torch.ones(2, 1024))


@pytest.mark.parametrize("compile", [False, True])
def test_a_gradient_that_is_not_finite_changes_nothing_where_it_is_skipped(compile: bool) -> None:
    weight, copy = (nn.Parameter(torch.ones(2, 1024)), torch.ones(2, 1024, dtype=torch.bfloat16))
    optimizer = elementwise([{"params": [weight]}], torch.bfloat16, compile, {weight: copy})
    weight.grad = torch.full((2, 1024), math.nan)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(math.nan), torch.tensor(1.0)
    optimizer.step()
    assert (weight == 1).all()
    assert (copy == 1).all()
    assert not any(value.any() for value in optimizer.state[weight].values())


def test_gradients_that_are_kept_by_mistake_are_those_that_were_clipped() -> None:
    words = "model=llama2_debug", "parallel=none", "defects.keep_gradients=true", "train.clip_grad_norm=0.1"
    norms = []
    for dtype in ("null", "float32"):
        with assembled(config(*words, f"optimizer.moment_dtype={dtype}")) as loop:
            norms.append([loop.step().grad_norm.item() for _ in range(4)])
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


@pytest.mark.parametrize("words", [(), ("optimizer.compile=true",), ("optimizer.moment_dtype=bfloat16",)])
def test_a_step_holds_what_formulas_say_and_the_model_has_the_rounded_weights(words: tuple[str, ...]) -> None:
    cfg = config("model=llama2_debug", "parallel=none", "train.dtype=bfloat16", *words)
    with assembled(cfg) as loop:
        for _ in range(2):
            loop.step()
    state = loop.state
    expected = expected_memory(plain_model(cfg.model), loop.setup.plan, cfg)
    held = [t for one in state.optimizer.state.values() for t in one.values() if isinstance(t, Tensor)]
    with state.weights() as masters:
        assert sum(t.nbytes for t in (*held, *masters.values())) == expected["optimizer"]
        for copy, master in zip(state.model.parameters(), masters.values(), strict=True):
            assert master.dtype is torch.float32
            assert torch.equal(copy, master.bfloat16())


def test_no_tensor_is_updated_without_a_gradient() -> None:
    weights = [nn.Parameter(torch.ones(2, 1024)), nn.Parameter(torch.ones(3))]
    optimizer = build_optimizer(weights, OptimizerConfig(compile=True))
    optimizer.step()
    weights[1].grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(weights[0].detach(), torch.ones(2, 1024))
    assert weights[0] not in optimizer.state
    assert math.isclose(weights[1][0].item(), 1 - 3e-3, rel_tol=1e-6)
