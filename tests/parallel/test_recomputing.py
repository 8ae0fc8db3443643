"""Activation checkpointing of blocks that change tensors in place: the same gradients, or a refusal in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.composed import config
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from tpresearch.config import ConfigError
from tpresearch.config.choices import Checkpointing
from tpresearch.parallel.apply import wrap_forward


class Block(nn.Module):
    def __init__(self, change: Callable[[Block, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self._change = nn.Linear(8, 8), nn.Linear(8, 8), change
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self._change(self, x))


def counting(block: Block, x: Tensor) -> Tensor:
    block.seen += 1
    return block.first(x) * block.seen


def replacing(block: Block, x: Tensor) -> Tensor:
    block.seen = block.seen + 1
    return block.first(x) * block.seen


CHANGES: dict[str, Callable[[Block, Tensor], Tensor]] = {
    "output": lambda block, x: block.first(x).relu_(),
    "output of rows": lambda block, x: (x[None] @ block.first.weight).mul_(2).tanh()[0],
    "scores": lambda block, x: (x.expand(2, 4, 8) @ block.first(x).mT).div_(3).softmax(-1)[0] @ x,
    "part of its output": lambda block, x: torch.cat(
        [t.sigmoid_() for t in block.first(x).unsafe_chunk(2, 1)], 1
    ),
    "input": lambda block, x: block.first(x.mul_(0.5)).tanh(),
    "buffer": counting,
    "another buffer": replacing,
}
REFUSED = {
    **{
        (change, "selective"): "in place the output of a matmul"
        for change in ("output", "output of rows", "scores", "part of its output")
    },
    **{("input", kind): "its input" for kind in ("selective", "full")},
    **{(f"{a}buffer", kind): "its buffer seen" for a in ("", "another ") for kind in ("selective", "full")},
}


@pytest.mark.parametrize("kind", ["selective", "full"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_in_place_is_computed_right_or_refused(change: str, kind: str) -> None:
    def gradients(kind: Checkpointing) -> list[Tensor | None]:
        torch.manual_seed(0)
        block, x = Block(CHANGES[change]), torch.randn(4, 8, requires_grad=True)
        parallel = config("model=toy_mlp", f"parallel.activation_checkpointing={kind}").parallel
        wrap_forward(block, parallel, has_rules=False)
        block(x * 1).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in block.parameters())]

    if why := REFUSED.get((change, kind)):
        with pytest.raises(
            ConfigError, match=rf"^parallel\.activation_checkpointing={kind}: the block Block changes {why}"
        ):
            gradients(Checkpointing(kind))
    else:
        torch.testing.assert_close(gradients(Checkpointing(kind)), gradients(Checkpointing.none))


class Ended(nn.Module):
    """Two matmuls, and maybe an op whose backward needs what the second gives."""

    def __init__(self, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self._end = nn.Linear(8, 8), nn.Linear(8, 8), end

    def forward(self, x: Tensor) -> Tensor:
        return x + self._end(self.second(self.first(x).tanh()))


class Matmuls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.split(".")[0] in ("mm", "addmm")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("end", [torch.neg, torch.tanh, functional.silu])
def test_matmuls_are_computed_again_by_full_checkpointing_and_in_a_second_backward(
    end: Callable[[Tensor], Tensor],
) -> None:
    def gradients(kind: str) -> tuple[list[int], list[Tensor | None]]:
        torch.manual_seed(0)
        block, x = Ended(end), torch.randn(4, 8, requires_grad=True)
        parallel = config("model=toy_mlp", f"parallel.activation_checkpointing={kind}").parallel
        wrap_forward(block, parallel, has_rules=False)
        counts = []
        with Matmuls() as matmuls:
            loss = block(x).square().sum()
            for _ in range(2):
                loss.backward(retain_graph=True)
                counts.append(matmuls.count)
        return counts, [x.grad, *(parameter.grad for parameter in block.parameters())]

    again = 1 if end is torch.neg else 2
    (first, second), expected = gradients("none")
    for kind, counts in {
        "selective": [first, second + again],
        "full": [first + again, second + 2 * again],
    }.items():
        assert gradients(kind)[0] == counts
        torch.testing.assert_close(gradients(kind)[1], expected)


@torch.library.custom_op(
    "tests::_scaled_dot_product_flash_attention", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded,)
)
def drawing_attention(x: Tensor, dropout_p: float) -> Tensor:
    """Attention that draws in its kernel, as a GPU's do."""
    return x * torch.empty_like(x).bernoulli_(1 - dropout_p)


drawing_attention.register_autograd(lambda ctx, g: (g, None))


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        attended = drawing_attention(self.first(x), 0.5)
        return self.second(functional.dropout(attended, 0.5)).tanh()


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_what_is_drawn_after_attention_with_dropout_is_drawn_again(kind: str) -> None:
    def gradients(kind: str) -> list[Tensor | None]:
        torch.manual_seed(0)
        block, x = Dropping(), torch.randn(4, 8)
        wrap_forward(
            block, config("model=toy_mlp", f"parallel.activation_checkpointing={kind}").parallel, False
        )
        block(x).sum().backward()
        return [parameter.grad for parameter in block.parameters()]

    torch.testing.assert_close(gradients(kind), gradients("none"))


class Remembering(nn.Module):
    """Computes a table once, by a matmul."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.layer, self.size = nn.Linear(8, 8, bias=False), size
        self.table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.ones(4, self.size) @ torch.ones(self.size, 8)
        return (self.layer(x) * self.table).tanh()


@pytest.mark.parametrize("size", [8, 2])
def test_a_matmul_that_is_computed_once_is_not_taken_for_another(size: int) -> None:
    def gradient(kind: str) -> Tensor | None:
        torch.manual_seed(0)
        block, x = Remembering(size), torch.randn(4, 8)
        parallel = config("model=toy_mlp", f"parallel.activation_checkpointing={kind}").parallel
        wrap_forward(block, parallel, has_rules=False)
        block(x).sum().backward()
        return block.layer.weight.grad

    if size == 8:
        with pytest.raises(ConfigError, match="the block Remembering has other matmuls"):
            gradient("selective")
    else:
        torch.testing.assert_close(gradient("selective"), gradient("none"))


class Power(nn.Module):
    def forward(self, x: Tensor, *, power: int = 1) -> Tensor:
        return x**power


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_an_evaluation_is_given_keyword_arguments_as_training_is(kind: str) -> None:
    block, x = Power(), torch.arange(4.0, requires_grad=True)
    wrap_forward(block, config("model=toy_mlp", f"parallel.activation_checkpointing={kind}").parallel, False)
    torch.testing.assert_close(block(x, power=2), x**2)
    with torch.no_grad():
        torch.testing.assert_close(block(x, power=2), x**2)


def by_a_changed_buffer(block: Block, x: Tensor) -> Tensor:
    block.seen += 1
    return block.first(x)


@pytest.mark.parametrize(
    ("change", "why"),
    [(counting, "its buffer seen"), (CHANGES["input"], None), (replacing, None), (by_a_changed_buffer, None)],
)
def test_compiled_gradients_by_a_changed_tensor_are_right_or_refused(
    change: Callable[[Block, Tensor], Tensor], why: str | None
) -> None:
    def gradients(compiles: bool) -> list[Tensor | None]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        block, x = Block(change), torch.randn(4, 8, requires_grad=True)
        parallel = config("model=toy_mlp", f"parallel.compile={compiles}").parallel
        wrap_forward(block, parallel, has_rules=False, backend="aot_eager")
        for _ in range(2):
            block(x * 1).square().sum().backward()
        return [x.grad, *(parameter.grad for parameter in block.parameters())]

    if why:
        with pytest.raises(ConfigError, match=rf"^parallel\.compile=true: the block Block changes {why}"):
            gradients(True)
    else:
        torch.testing.assert_close(gradients(True), gradients(False))


@pytest.mark.parametrize("kind", [Checkpointing.selective, Checkpointing.full])
def test_a_block_that_takes_a_gradient_by_a_transform_is_refused(kind: Checkpointing) -> None:
    block = Block(lambda block, x: torch.func.grad(lambda y: block.first(y).square().sum())(x))
    wrap_forward(block, config(f"parallel.activation_checkpointing={kind}").parallel, has_rules=False)
    with pytest.raises(ConfigError, match="takes a gradient by a transform"):
        block(torch.rand(4, 8))
