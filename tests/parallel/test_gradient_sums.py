"""Gradients that matmuls add up (`parallel.gradient_accumulation_fusion=true`) are those that autograd adds up."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import nets
from support.assembled import assembled
from support.composed import config
from support.counted_steps import FAKE
from support.marks import exhaustive, on_card
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpresearch.config import Config, ConfigError
from tpresearch.config.axes import MeshSizes
from tpresearch.config.validate import validate
from tpresearch.parallel.gradient_sums import GradientSums, summing_layers
from tpresearch.parallel.summed_gradients import add_product_
from tpresearch.plan.compiler import Plan
from tpresearch.train.loop import Loop
from tpresearch.train.preflight import plan_model

pytestmark = pytest.mark.usefixtures("own_graphs")

FUSED = "parallel.gradient_accumulation_fusion=true"
PARTS = "parallel=none", "train.micro_batch_size=2"
"""A step of four micro-batches."""


@pytest.fixture(autouse=True)
def _memory_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum that nothing was written to has what was there before."""
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **options: empty_like(t, **options).fill_(math.nan))


def run(cfg: Config, use: Callable[[Loop], list[float]]) -> list[float]:
    with assembled(cfg, device=FAKE) as loop:
        return use(loop)


def losses(loop: Loop) -> list[float]:
    found = []
    for _ in range(3):
        result = loop.step()
        found += [result.loss.item(), result.grad_norm.item()]
    return found


@pytest.mark.parametrize(
    "words",
    [
        ("parallel.activation_checkpointing=full",),
        exhaustive(("parallel.activation_checkpointing=selective", "train.loss_chunk=null")),
        ("defects.keep_gradients=true", "train.clip_grad_norm=0.1"),
    ],
    ids=" ".join,
)
def test_it_trains_the_same(words: tuple[str, ...]) -> None:
    cfg = "model=llama2_debug", *PARTS, "train.dtype=float64", *words
    assert run(config(*cfg, FUSED), losses) == pytest.approx(run(config(*cfg), losses), rel=1e-12)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("optimizer.moment_dtype=bfloat16",),
        exhaustive(("optimizer.compile=true", "optimizer.moment_dtype=bfloat16")),
        ("train.weights=bfloat16",),
    ],
)
def test_in_bfloat16_it_trains_the_same_to_rounding(words: tuple[str, ...]) -> None:
    cfg = "model=llama2_debug", *PARTS, "train.dtype=bfloat16", *words
    assert run(config(*cfg, FUSED), losses) == pytest.approx(run(config(*cfg), losses), rel=0.01)


@pytest.mark.parametrize("kind", [exhaustive("none"), "selective", exhaustive("full"), "budget"])
def test_one_graph_serves_every_step(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = "model=llama2_debug", *PARTS, "train.dtype=float64", "train.eval_rows=8", "train.loss_chunk=null"
    plain = run(config(*cfg), losses)
    counter, compile_ = CompileCounterWithBackend("aot_eager"), torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_(f, **(options | {"backend": counter}))
    )

    def counted(loop: Loop) -> list[float]:
        found = losses(loop)
        loop.evaluate()
        loop.step()
        assert counter.frame_count == 1
        return found

    words = "parallel.compile=true", f"parallel.activation_checkpointing={kind}", FUSED
    assert run(config(*cfg, *words), counted) == pytest.approx(plain, rel=1e-12)


class Block(nn.Module):
    """A layer, used twice, whose weight is another layer's too, with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(48, 48), nn.Linear(48, 48)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(torch.tanh(self.first(x)))
        return self.second(torch.tanh(hidden))


@pytest.mark.parametrize("backend", [None, "aot_eager", exhaustive("inductor")])
def test_a_weight_that_is_used_again_gets_the_sum_of_its_uses(backend: str | None) -> None:
    """Inductor's own code adds up every day in the test of what it copies."""
    torch.manual_seed(0)
    block = Block().double()
    weight, bias = block.first.weight, block.first.bias
    inputs = [torch.randn(2, 5, 48, dtype=torch.float64) for _ in range(3)]
    for x in inputs:
        block(x).square().sum().backward()
    expected, weight.grad, bias.grad = (weight.grad, bias.grad), None, None
    sums = GradientSums({layer: layer.get_parameter("weight") for layer in (block.first, block.second)})
    forward = block.forward
    if backend:
        forward = torch.compile(forward, fullgraph=True, dynamic=False, backend=backend)
    with sums.collecting():
        for x in inputs:
            forward(x).square().sum().backward()
    torch.testing.assert_close((weight.grad, bias.grad), expected, rtol=1e-12, atol=1e-12)


def test_outside_of_a_step_gradients_are_autograds_own() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    with GradientSums({layer: layer.get_parameter("weight")}).collecting():
        pass
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(2, 3))


class Words(nn.Module):
    """An embedding, and an output layer that may have its weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed, self.output = nn.Embedding(50, 12), nn.Linear(12, 50, bias=False)
        if tied:
            self.output.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.embed(tokens)))


def looked_up(model: Words, tokens: Tensor) -> Tensor:
    return model(tokens)


def read_as_a_matrix(model: Words, tokens: Tensor) -> Tensor:
    """Of which autograd has a gradient of all rows."""
    return model(tokens) @ model.embed.weight


def with_a_slope(model: Words, tokens: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(model(tokens).square().sum(), model.embed.weight)
    return model(tokens) * gradient.square().sum()


def without_a_gradient(model: Words, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = model.embed(tokens)
    return model.output(hidden)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("use", [looked_up, read_as_a_matrix, with_a_slope, without_a_gradient])
def test_an_embedding_gets_the_sum_of_its_tokens(use: Callable[[Words, Tensor], Tensor], tied: bool) -> None:
    torch.manual_seed(0)
    model, batches = Words(tied).double(), torch.randint(0, 9, (3, 2, 7))
    for tokens in batches:
        use(model, tokens).square().sum().backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    sums = GradientSums(summing_layers(model, Plan({}, [], [], MeshSizes())))
    for _ in range(2):
        with sums.collecting():
            for tokens in batches:
                use(model, tokens).square().sum().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_an_embeddings_gradient_is_of_its_tokens_rows() -> None:
    """And rounded to the weight's dtype nowhere, if the sum is wider."""
    torch.manual_seed(0)
    layer, wide = nn.Embedding(1000, 4, dtype=torch.bfloat16), nn.Parameter(torch.zeros(1000, 4))
    tokens, weights = torch.randint(0, 5, (300,)), torch.randn(300, 4, dtype=torch.bfloat16)
    sums, sizes = GradientSums({layer: wide}), list[int]()
    with sums.collecting(), Sizes(sizes):
        for _ in range(2):
            (layer(tokens) * weights).sum().backward()
    expected = torch.zeros(1000, 4, dtype=torch.float64).index_add_(0, tokens, 2 * weights.double())
    torch.testing.assert_close(wide.grad, expected.float(), rtol=1e-5, atol=1e-6)
    assert max(sizes) < 1000 * 4  # made by an op, besides the sum


@pytest.mark.parametrize("device", ["cpu", on_card("cuda")])
def test_an_embeddings_gradient_in_bfloat16_is_autograds_own(device: str) -> None:
    """Added by rows to a sum in bfloat16, a GPU would round it after each token: 600 ones would come to 256."""
    torch.manual_seed(0)
    layer = nn.Embedding(3, 64, dtype=torch.bfloat16, device=device)
    tokens, drawn = torch.zeros(200, dtype=torch.long, device=device), torch.randn(200, 64).to(layer.weight)
    weights = torch.cat((torch.ones_like(drawn[:, :32]), drawn[:, 32:]), dim=1)

    def gradient() -> Tensor | None:
        for _ in range(3):
            (layer(tokens) * weights).sum().backward()
        return layer.weight.grad

    expected, layer.weight.grad = gradient(), None
    with GradientSums({layer: layer.get_parameter("weight")}).collecting():
        found = gradient()
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)
    assert (found[0, :32] == 600).all()


def test_an_embedding_of_one_token() -> None:
    layer = nn.Embedding(3, 4)
    with GradientSums({layer: layer.get_parameter("weight")}).collecting():
        layer(torch.tensor(1)).sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [4 * [0], 4 * [1], 4 * [0]]


@pytest.mark.parametrize("tied", [False, True])
def test_weights_that_get_a_hook_or_are_frozen_later(tied: bool) -> None:
    torch.manual_seed(0)
    model, batches = Words(tied).double(), torch.randint(0, 9, (3, 2, 7))
    sums = GradientSums(summing_layers(model, Plan({}, [], [], MeshSizes())))
    model.output.weight.register_hook(lambda gradient: 2 * gradient)
    for _ in range(2):
        for tokens in batches:
            model(tokens).square().sum().backward()
        expected = {name: parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        with sums.collecting():
            for tokens in batches:
                model(tokens).square().sum().backward()
        found = {name: parameter.grad for name, parameter in model.named_parameters()}
        assert [name for name in found if found[name] is None] == [n for n in expected if expected[n] is None]
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        model.zero_grad()
        model.embed.weight.requires_grad_(tied)


def test_a_model_is_saved_whole_and_copied(tmp_path: Path) -> None:
    model, tokens = Words(tied=True), torch.randint(0, 9, (2, 7))
    GradientSums(summing_layers(model, Plan({}, [], [], MeshSizes())))
    torch.save(model, tmp_path / "model.pt")
    for other in (torch.load(tmp_path / "model.pt", weights_only=False), copy.deepcopy(model)):
        assert torch.equal(other(tokens), model(tokens))
        assert other.output.weight is other.embed.weight
        other(tokens).sum().backward()
        assert other.embed.weight.grad is not None
    assert model.embed.weight.grad is None


class Sizes(TorchDispatchMode):
    """Numbers of elements that ops make, views and what they change aside."""

    def __init__(self, found: list[int]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func._schema.is_mutable and not func.is_view:
            self.found.extend(t.numel() for t in tree_leaves(made) if isinstance(t, Tensor))
        return made


class Own(nn.Linear):
    def twice(self, x: Tensor) -> Tensor:
        return 2 * self(x)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.own = nn.Linear(48, 48), Own(48, 48)


def without_grad(model: Pair, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = model.first(x)
    return model.own(hidden)


def with_weight(model: Pair, weight: Tensor, x: Tensor) -> Tensor:
    return model.own(torch.func.functional_call(model.first, {"weight": weight}, x))


def transformed(model: Pair, x: Tensor) -> Tensor:
    gradient = torch.func.grad(lambda x: model.first(x).square().sum())(x)
    return torch.vmap(model.own)(x + gradient) + model.own(x)


def in_autocast(model: Pair, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.own(model.first(x)).float()


def after_another_gradient(model: Pair, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(model.first(x).square().sum(), x)
    return model.own(x + gradient)


def with_a_penalty_on_a_gradient(model: Pair, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    (gradient,) = torch.autograd.grad(model.first(x).square().sum(), x, create_graph=True)
    return model.own(x) + gradient


def with_an_inner_step(model: Pair, x: Tensor) -> Tensor:
    weight = model.first.weight
    (gradient,) = torch.autograd.grad(model.own(model.first(x)).sum(), weight, create_graph=True)
    return model.own(nn.functional.linear(x, weight - gradient)) + model.first(x)


def as_layers(model: Pair, x: Tensor) -> Tensor:
    return model.own(model.first(x))


USES: dict[str, Callable[[Pair, Tensor], Tensor]] = {
    "no_grad": without_grad,
    "functional_call": lambda model, x: with_weight(model, torch.tanh(model.first.weight), x),
    "functional_call with a parameter": lambda model, x: with_weight(model, model.own.weight, x),
    "transforms": transformed,
    "autocast": in_autocast,
    "a vector, and a layer without a gradient": lambda model, x: model.own(x[0, 0]),
    "a class of its own": lambda model, x: model.own.twice(x),
}


@pytest.mark.parametrize(
    ("use", "compiles"),
    [
        *(
            pytest.param(use, compiles, id=f"{name}{' compiled' * compiles}")
            for name, use in USES.items()
            for compiles in (False, True)
        ),
        # Of which dynamo makes no graph.
        pytest.param(after_another_gradient, False, id="autograd.grad"),
        pytest.param(with_a_penalty_on_a_gradient, False, id="autograd.grad twice"),
        pytest.param(with_an_inner_step, False, id="autograd.grad of the weight"),
    ],
)
def test_layers_learn_the_same_however_a_model_uses_them(
    use: Callable[[Pair, Tensor], Tensor], compiles: bool
) -> None:
    """In a step by itself, and in the next one before a micro-batch that calls the layers."""
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(2, 5, 48)

    def gradients(step: Iterable[Callable[[Pair, Tensor], Tensor]]) -> dict[str, Tensor | None]:
        for forward in step:
            forward(model, x).square().sum().backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = []
    for step in ((use,), (use, as_layers)):
        expected.append(gradients(step))
        model.zero_grad()
    sums = GradientSums(summing_layers(model, Plan({}, [], [], MeshSizes())))
    forward = torch.compile(use, backend="aot_eager", fullgraph=True) if compiles else use
    for step, right in zip(((forward,), (forward, as_layers)), expected, strict=True):
        with sums.collecting():
            gradients(step)
        found = gradients(())
        assert [name for name in found if found[name] is None] == [n for n in right if right[n] is None]
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, right[name], rtol=1e-4, atol=1e-4)
        model.zero_grad()


@pytest.mark.parametrize("asks", ["input", exhaustive("weight"), exhaustive("all")])
def test_a_gradient_that_is_taken_through_a_compiled_block_is_not_added(asks: str) -> None:
    """Inductor's own code: only there the op is given the sum itself."""
    layer, x = nn.Linear(48, 48), torch.randn(6, 48)
    weight = layer.get_parameter("weight")

    def loss(forward: Callable[[Tensor], Tensor]) -> Tensor:
        y = x.clone().requires_grad_()
        first = forward(y).square().sum()
        if asks == "all":
            first.backward()
            assert y.grad is not None
            return (forward(x) * y.grad).sum()
        (gradient,) = torch.autograd.grad(first, y if asks == "input" else weight)
        return (forward(x) * gradient.sum()).sum()

    loss(layer).backward()
    expected, weight.grad = weight.grad, None
    sums = GradientSums({layer: weight})
    forward = torch.compile(layer.__call__, fullgraph=True, dynamic=False)
    with sums.collecting():
        if asks == "weight":
            with pytest.raises(ConfigError, match=r"asks `autograd\.grad` for the gradient of a weight"):
                loss(forward)
            return
        loss(forward).backward()
    torch.testing.assert_close(weight.grad, expected)


def test_a_compiled_backward_copies_no_sum() -> None:
    layer = nn.Linear(48, 80, bias=False)
    sums, x = GradientSums({layer: layer.get_parameter("weight")}), torch.randn(6, 48, requires_grad=True)
    forward = torch.compile(lambda x: layer(torch.tanh(x)), fullgraph=True, dynamic=False)
    layer(torch.tanh(x)).sum().backward()
    expected, layer.weight.grad = layer.weight.grad, None
    assert expected is not None
    with sums.collecting():
        _, codes = run_and_get_code(lambda: forward(x).sum().backward())
        forward(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, 2 * expected)
    adding = next(code for code in codes if "add_product_" in code)
    assert "(6, 48)" in adding  # buffers are allocated by their shapes
    assert not any(f"empty_strided_cpu({shape}" in adding for shape in ("(80, 48)", "(48, 80)"))


def test_the_first_product_of_a_step_is_written_and_added_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(48, 80, bias=False), torch.randn(6, 48)
    sums, called = GradientSums({layer: layer.get_parameter("weight")}), list[str]()
    for name in ("zeros_like", "mm", "addmm"):
        function = functools.partial(lambda name, op, *a, **k: (called.append(name), op(*a, **k))[1], name)
        monkeypatch.setattr(torch, name, functools.partial(function, getattr(torch, name)))
    for _ in range(2):
        with sums.collecting():
            for _ in range(3):
                layer(x).sum().backward()
        assert layer.weight.grad is not None
        torch.testing.assert_close(layer.weight.grad, 3 * x.sum(0).expand(80, 48))
    assert called == ["mm", "addmm", "addmm"] * 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_product_is_not_rounded_to_the_dtype_of_its_factors(dtype: torch.dtype) -> None:
    """Integers below 2^8 are bfloat16 numbers, and sums of their products are float32 numbers."""
    first, second = (torch.randint(-255, 256, shape) for shape in ((7, 96), (96, 5)))
    total = torch.ones(7, 5, dtype=torch.promote_types(dtype, torch.float32))
    begun = torch.tensor(True)
    add_product_(total, first.to(dtype), second.to(dtype), begun)
    assert torch.equal(total.long(), 1 + first @ second)
    add_product_(total, first.to(dtype), second.to(dtype), begun.logical_not_())
    assert torch.equal(total.long(), first @ second)
    assert begun


def test_layers_are_those_that_run_as_linear_layers_and_learn() -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    class DoubledRows(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "own": Doubled(2, 2), "frozen": nn.Linear(2, 2)})
    model["own rows"] = DoubledRows(2, 2)
    model["frozen"].requires_grad_(False)
    model["head"], model["complex"] = nn.Linear(2, 2), nn.Linear(2, 2, dtype=torch.complex64)
    model["rows"], model["in block"] = nn.Embedding(2, 2), nn.ModuleDict({"rows": nn.Embedding(2, 2)})
    model["padded"], model["bounded"] = nn.Embedding(2, 2, padding_idx=0), nn.Embedding(2, 2, max_norm=1.0)
    model["counted"], model["sparse"] = (
        nn.Embedding(2, 2, scale_grad_by_freq=True),
        nn.Embedding(2, 2, sparse=True),
    )
    model["shared with block"] = nn.Embedding(2, 2)
    model["block"] = nn.ModuleDict({"shared": model["shared with block"]})
    plan = Plan({}, ["in block", "block"], [], MeshSizes())
    assert list(summing_layers(model, plan)) == [model["plain"], model["head"], model["rows"]]


@pytest.mark.parametrize(
    ("words", "ranks", "why"),
    [
        (("parallel=tp",), 2, "sharded, summed over ranks or offloaded"),
        (("parallel=fsdp", "parallel.fsdp.cpu_offload=true"), 1, "sharded, summed over ranks or offloaded"),
        (("train.float8=tensorwise", "train.dtype=bfloat16"), 1, "a float8 matmul of torchao's"),
        (("train.micro_batch_size=null",), 1, "a step has one micro-batch"),
    ],
    ids=["tp", "offload", "float8", "one micro-batch"],
)
def test_it_is_refused_where_nothing_would_be_added_so(words: tuple[str, ...], ranks: int, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        validate(config(*PARTS, FUSED, *words), ranks)
    assert validate(config(*PARTS, FUSED), 1) == MeshSizes()


def test_it_is_refused_for_a_model_without_such_a_layer() -> None:
    with pytest.raises(ConfigError, match=r"has no nn\.Linear that learns"):
        plan_model(config(*nets.model(nets.FrozenLayers), *PARTS, FUSED), MeshSizes())
    plan_model(config(*nets.model(nets.FrozenBlock), *PARTS, FUSED), MeshSizes())
