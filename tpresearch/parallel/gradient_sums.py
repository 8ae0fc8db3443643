"""Weight gradients that backward's matmuls add to the sum over micro-batches themselves, as Megatron-LM's
`--gradient-accumulation-fusion` does: otherwise a matmul writes a gradient, and a second kernel reads it, reads the sum and
writes the sum, 6 bytes per element in bfloat16 and 10 into float32 master weights' gradients.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.plan.compiler import Plan


class GradientSums:
    """Gradients of linear layers' weights, which are zeroed at the beginning of a step and added to in backward.

    Args:
        trained: by layer, the parameter that has its weight's gradient: its master, or the weight itself.
    """

    def __init__(self, trained: Mapping[nn.Linear, nn.Parameter]) -> None:
        self._trained = {_as_summing(layer): parameter for layer, parameter in trained.items()}

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Backward adds to the parameters' gradients, which begin as zeros. One that nothing was added to becomes none, by which
        an optimizer leaves its weight alone."""
        for parameter in dict.fromkeys(self._trained.values()):  # of layers that share one, once
            parameter.grad = torch.zeros_like(parameter)
        begun = {parameter: _changes(parameter) for parameter in self._trained.values()}
        for layer, parameter in self._trained.items():
            layer.gradient_sum = parameter.grad
        try:
            yield
        finally:
            for layer in self._trained:
                layer.gradient_sum = None
            for parameter, before in begun.items():
                if _changes(parameter) == before:
                    parameter.grad = None


def _changes(parameter: nn.Parameter) -> int:
    """How often its gradient was changed in place."""
    return -1 if parameter.grad is None else parameter.grad._version


def summing_layers(model: nn.Module, plan: Plan, loss_chunk: int | None) -> dict[nn.Linear, nn.Parameter]:
    """The linear layers that run as `nn.Linear` does and learn, and their weights: a matmul can add to these gradients."""
    called, chunked_head = plan.probe.dims, plan.chunked_head if loss_chunk else None
    found = {
        layer: layer._parameters.get("weight")
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and type(layer).forward is nn.Linear.forward
        and (not called or name in called)  # another one needs no sum
        and name != chunked_head  # whose gradient the loss makes
    }
    return {layer: weight for layer, weight in found.items() if weight is not None and _is_summed(weight)}


def check_layers(model: nn.Module, plan: Plan, cfg: Config) -> None:
    """Refuse a model without such layers, whose matmuls would add to nothing.

    Raises:
        ConfigError: naming the key.
    """
    if not summing_layers(model, plan, cfg.train.loss_chunk):
        why = f"model {cfg.model.name} has no nn.Linear that learns, besides an output layer whose gradient the loss makes"
        raise ConfigError("parallel.gradient_accumulation_fusion", True, why, "false")


def _is_summed(weight: nn.Parameter) -> bool:
    """Whether it learns, by a gradient of real numbers: one of complex numbers takes conjugates."""
    return weight.requires_grad and weight.is_floating_point()


class _SummingLinear(nn.Linear):
    """A linear layer whose backward adds its weight's gradient to `gradient_sum`, while there is one."""

    gradient_sum: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:  # pyrefly: ignore[bad-override-param-name]
        # In autocast the factors have another dtype than the weight; `functional_call` computes with another weight.
        is_plain = not torch.is_autocast_enabled(x.device.type) and isinstance(self.weight, nn.Parameter)
        if self.gradient_sum is None or not is_plain:
            return super().forward(x)
        y: Tensor = _Product.apply(x, self.weight, self.gradient_sum)
        return y if self.bias is None else y + self.bias


def _as_summing(layer: nn.Linear) -> _SummingLinear:
    """The same layer. (A class, since dynamo compiles once for all methods of one, and again for each function of an object's own.)"""
    layer.__class__ = _summing(type(layer))  # a class is hashable
    return cast(_SummingLinear, layer)


@functools.cache
def _summing(kind: type[nn.Linear]) -> type[_SummingLinear]:
    """A class with the methods and the name of the model's own."""
    return type(kind.__name__, (_SummingLinear, kind), {})


class _Product(torch.autograd.Function):
    """x @ weight.T, whose backward adds the weight's gradient to `total` and returns none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total = total  # not saved, since it changes before a layer's second backward
        return F.linear(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, None, None]:  # pyrefly: ignore[bad-override]
        x, weight = ctx.saved_tensors
        if _is_asked_for(ctx):
            first, second = (t.reshape(-1, t.shape[-1]) for t in (of_output, x))
            add_product_(ctx.total, first.t(), second)
        return of_output @ weight if ctx.needs_input_grad[0] else None, None, None


def _is_asked_for(ctx: Any) -> bool:
    """Whether this backward is to give the weight a gradient: not where a model asks `autograd.grad` for another one (private;
    read in torch 2.11 to 2.14)."""
    if torch.compiler.is_compiling() or not ctx.needs_input_grad[1]:
        return bool(ctx.needs_input_grad[1])
    of_weight = ctx.next_functions[1][0]
    return torch._C._will_engine_execute_node(of_weight)


@torch.library.custom_op("tpresearch::add_product_", mutates_args=("total",))
def add_product_(total: Tensor, first: Tensor, second: Tensor) -> None:
    """total += first @ second, in one matmul. The product has the dtype of `total`, which may be wider than its factors'.

    An op of its own, since a compiled graph would write aten's sum to another buffer and copy it.
    """
    if total.dtype is first.dtype:
        total.addmm_(first, second)
    elif total.is_cuda:
        torch.addmm(total, first, second, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(first.to(total.dtype), second.to(total.dtype))


@add_product_.register_fake
def _(total: Tensor, first: Tensor, second: Tensor) -> None: ...
