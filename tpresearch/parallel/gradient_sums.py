"""Weight gradients that backward's matmuls add to the sum over micro-batches themselves, as Megatron-LM's
`--gradient-accumulation-fusion` does: otherwise a matmul writes a gradient, and a second kernel reads it, reads the sum and
writes the sum, 6 bytes per element in bfloat16 and 10 into float32 master weights' gradients. An embedding adds only the
rows of its tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.parallel.summed_gradients import ACCUMULATORS, SummedProduct, SummedRows, place_of
from tpresearch.plan.compiler import Plan

Layer = nn.Linear | nn.Embedding


class GradientSums:
    """Gradients of linear layers' weights, which the first matmul of a step writes and later ones add to, and of embeddings, if they
    are float32: into bfloat16, a GPU's `index_put_` would round after each token.

    Args:
        trained: by layer, the parameter that has its weight's gradient: its master, or the weight itself.
    """

    def __init__(self, trained: Mapping[Layer, nn.Parameter]) -> None:
        summed = {x: own for x, own in trained.items() if isinstance(x, nn.Linear) or own.itemsize >= 4}
        self._trained = {_as_summing(layer): parameter for layer, parameter in summed.items()}
        self._begun = {parameter: torch.zeros((), dtype=torch.bool) for parameter in self._trained.values()}
        self._of_rows = {x for layer, x in self._trained.items() if isinstance(layer, nn.Embedding)}
        for layer, parameter in self._trained.items():
            layer.summed, layer.begun = (layer.weight,), self._begun[parameter]

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Backward adds to the parameters' gradients. One that nothing was added to becomes none, by which an optimizer leaves its
        weight alone."""
        for parameter, begun in self._begun.items():
            is_of_rows = parameter in self._of_rows  # else without zeros, a pass over memory
            parameter.grad = torch.zeros_like(parameter) if is_of_rows else torch.empty_like(parameter)
            begun.fill_(is_of_rows)
        unwritten = {parameter: _changes(parameter) for parameter in self._begun}
        hooks = []
        try:
            for layer, parameter in self._trained.items():
                layer.open_losses = 0
                if layer.weight.requires_grad:  # still
                    # A hook on the weight is to be given its gradient.
                    layer.gradient_sum = None if layer.weight._backward_hooks else parameter.grad
                    ACCUMULATORS[place_of(parameter.grad)] = accumulator = _accumulator(layer.weight)
                    begin = functools.partial(_begin, parameter.grad, self._begun[parameter])
                    hooks.append(accumulator.register_prehook(begin))
            yield
        finally:
            ACCUMULATORS.clear()
            for hook in hooks:
                hook.remove()
            for layer in self._trained:
                layer.gradient_sum = None
        if any(layer.open_losses for layer in self._trained):
            why = "the output layer's gradient was added to the step's sum as a loss was made, which backward did not reach once"
            legal = "false, or `torch.no_grad()` around a loss that is not trained on"
            raise ConfigError("parallel.gradient_accumulation_fusion", True, why, legal)
        for parameter, before in unwritten.items():
            if _changes(parameter) == before:
                parameter.grad = None


def _begin(total: Tensor | None, begun: Tensor, gradients: tuple[Tensor | None, ...]) -> None:
    """Zero a sum that nothing was written to before autograd adds to it: where a weight is used without its layer."""
    if total is not None and gradients[0] is not None and not is_fake(begun) and not begun:
        total.zero_()
        begun.fill_(True)


def _accumulator(weight: Tensor) -> Any:
    with torch.enable_grad():
        view = weight.view_as(weight)
    assert view.grad_fn
    return view.grad_fn.next_functions[0][0]


def _changes(parameter: nn.Parameter) -> int:
    """How often its gradient was changed in place."""
    return -1 if parameter.grad is None else parameter.grad._version


def summing_layers(model: nn.Module, plan: Plan) -> dict[Layer, nn.Parameter]:
    """The layers that run as `nn.Linear` does and learn, and their weights: a matmul can add to these gradients, the output
    layer's the loss that makes it in chunks. And embeddings outside of blocks, which may be compiled."""
    called = plan.probe.shapes
    in_blocks = {layer for block in plan.blocks for layer in model.get_submodule(block).modules()}
    found = {
        layer: layer._parameters.get("weight")
        for name, layer in model.named_modules()
        if (_is_linear(layer) or (_is_embedding(layer) and layer not in in_blocks))
        and (not called or name in called)  # another one needs no sum
    }
    return {
        layer: weight
        for layer, weight in found.items()
        if weight is not None
        and weight.requires_grad
        and weight.is_floating_point()  # a gradient of complex numbers takes conjugates
    }


def _is_linear(layer: nn.Module) -> TypeGuard[nn.Linear]:
    return isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward


def _is_embedding(layer: nn.Module) -> TypeGuard[nn.Embedding]:
    """Whether its gradient is the sum of its tokens' and nothing else."""
    if not isinstance(layer, nn.Embedding) or type(layer).forward is not nn.Embedding.forward:
        return False
    return layer.padding_idx is layer.max_norm is None and not (layer.scale_grad_by_freq or layer.sparse)


def check_layers(model: nn.Module, plan: Plan, cfg: Config) -> None:
    """Refuse a model without such layers, whose matmuls would add to nothing."""
    if not any(isinstance(layer, nn.Linear) for layer in summing_layers(model, plan)):
        why = f"model {cfg.model.name} has no nn.Linear that learns"
        raise ConfigError("parallel.gradient_accumulation_fusion", True, why, "false")


class Summing(nn.Module):
    """A layer whose weight's gradient is added to `gradient_sum`, while there is one."""

    weight: Tensor
    gradient_sum: Tensor | None = None
    begun: Tensor
    """Whether the sum has been written to in this step, on the CPU."""
    summed: tuple[Tensor, ...] = ()
    """The weight whose gradient is summed (in a tuple, or it would be one more parameter)."""
    open_losses: int = 0
    """Losses that have added to the sum as they were made, less those that backward has reached."""

    def __reduce__(self) -> tuple[Any, ...]:
        """By the model's own class, since pickle finds none that is made here by its name."""
        return _new_summing, (type(self).__bases__[1],), vars(self)

    def sum_now(self) -> Tensor | None:
        """The sum, if a use of the layer now is to be added to it: `functional_call` computes with another weight, and a transform
        such as `torch.func.grad` takes its own derivatives."""
        is_own = self.gradient_sum is not None and self.weight is self.summed[0] and not _is_transformed()
        return self.gradient_sum if is_own else None


def summing_now(layer: nn.Module) -> Summing | None:
    """The layer, if a loss that uses it now is to add its weight's gradient to the sum."""
    return layer if isinstance(layer, Summing) and layer.sum_now() is not None else None


class _SummingLinear(Summing, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override-param-name]
        total = self.sum_now()
        # In autocast the factors have another dtype than the weight.
        if total is None or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)
        y: Tensor = SummedProduct.apply(x, self.weight, total, self.begun)
        return y if self.bias is None else y + self.bias


class _SummingEmbedding(Summing, nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:  # pyrefly: ignore[bad-override-param-name]
        total = self.sum_now()
        return super().forward(tokens) if total is None else SummedRows.apply(tokens, self.weight, total)


def _is_transformed() -> bool:
    """Whether a transform of `torch.func`'s is running (private; read in torch 2.11 to 2.14)."""
    functorch = torch._C._functorch
    return isinstance(functorch.peek_interpreter_stack(), functorch.CInterpreter)


def _as_summing(layer: Layer) -> Summing:
    """The same layer. (A class, since dynamo compiles once for all methods of one, and again for each function of an object's own.)"""
    setattr(layer, "__class__", _summing(type(layer)))  # noqa: B010
    return cast(Summing, layer)


@functools.cache
def _summing(kind: type[Layer]) -> type[Summing]:
    """A class with the methods and the name of the model's own."""
    forward = _SummingLinear if issubclass(kind, nn.Linear) else _SummingEmbedding
    return type(kind.__name__, (forward, kind), {})


def _new_summing(kind: type[Layer]) -> Summing:
    return _summing(kind).__new__(_summing(kind))
