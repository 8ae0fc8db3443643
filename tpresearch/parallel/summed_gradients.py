"""Backward passes that add a weight's gradient to a sum themselves (see `gradient_sums.py`), and the matmul that does."""

from __future__ import annotations

from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tpresearch.config.errors import ConfigError

ACCUMULATORS: dict[int, Any] = {}
"""By the place of a gradient that is summed, the node of the autograd graph that would accumulate it."""


def place_of(tensor: Tensor | None) -> int:
    assert tensor is not None
    return tensor.untyped_storage()._cdata


class SummedProduct(torch.autograd.Function):
    """x @ weight.T, whose backward adds the weight's gradient to `total` and returns none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, total: Tensor, begun: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.total, ctx.begun = total, begun  # not saved, since they change before a layer's second backward
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, of_output: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        x, weight = ctx.saved_tensors
        of_input = of_output @ weight if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return of_input, None, None, None
        first, second = (t.reshape(-1, t.shape[-1]) for t in (of_output, x))
        if not torch.compiler.is_compiling():
            use = _use_of_gradient(ctx.next_functions[1][0])
            if use is not _Use.added:
                return of_input, first.t() @ second if use is _Use.returned else None, None, None
        with torch.no_grad():
            add_product_(ctx.total, first.t(), second, ctx.begun)
        return of_input, None, None, None


class SummedRows(torch.autograd.Function):
    """weight[tokens], whose backward adds the gradients of these rows to those of `total` and returns none."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, total: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.total = total
        return F.embedding(tokens, weight)

    @staticmethod
    def backward(ctx: Any, of_rows: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore[bad-override]
        (tokens,), total = ctx.saved_tensors, ctx.total
        use = _use_of_gradient(ctx.next_functions[1][0])
        if use is _Use.returned:
            dense = torch.ops.aten.embedding_dense_backward
            return None, dense(of_rows, tokens, len(total), padding_idx=-1, scale_grad_by_freq=False), None
        if use is _Use.added:
            with torch.no_grad():
                rows, values = tokens.flatten(), of_rows.reshape(-1, of_rows.shape[-1]).to(total.dtype)
                if total.is_cuda:  # where `index_add_` adds in any order
                    total.index_put_((rows,), values, accumulate=True)
                else:
                    total.index_add_(0, rows, values)
        return None, None, None


class _Use(Enum):
    """What a backward does with a weight's gradient."""

    added = auto()
    """It belongs to the step's."""
    returned = auto()
    """A model asks `autograd.grad` for it, or takes a derivative of it."""
    none = auto()
    """A model asks `autograd.grad` for others."""


def _use_of_gradient(accumulator: Any) -> _Use:
    """By the backward that is running, or a forward that makes gradients (private; read in torch 2.11 to 2.14)."""
    if torch._C._current_graph_task_id() == -1:
        return _Use.added
    if torch.is_grad_enabled():  # `create_graph`
        return _Use.returned
    try:
        is_run = torch._C._will_engine_execute_node(accumulator)
    except RuntimeError:  # "a leaf node was passed, but we are currently running autograd.grad()"
        return _Use.returned
    return _Use.added if is_run else _Use.none


@torch.library.custom_op("tpresearch::add_product_", mutates_args=("total", "begun"))
def add_product_(total: Tensor, first: Tensor, second: Tensor, begun: Tensor) -> None:
    """total += first @ second, in one matmul, or = where nothing has `begun` yet. The product has the dtype of `total`, which may
    be wider than its factors'.

    An op of its own, since a compiled graph would write aten's sum to another buffer and copy it. (`begun` is a tensor, since
    such a graph may give the op copies of both.)
    """
    accumulator = ACCUMULATORS.get(place_of(total))
    if accumulator is not None and (use := _use_of_gradient(accumulator)) is not _Use.added:
        if use is _Use.returned:
            why = "the model asks `autograd.grad` for the gradient of a weight in a compiled block, which is summed there"
            raise ConfigError("parallel.gradient_accumulation_fusion", True, why, "false")
        return
    wide: dict[str, Any] = {}
    if total.dtype is not first.dtype:
        if total.is_cuda:
            wide["out_dtype"] = total.dtype
        else:
            first, second = first.to(total.dtype), second.to(total.dtype)
    if begun:
        torch.addmm(total, first, second, **wide, out=total)
    else:
        torch.mm(first, second, **wide, out=total)
        begun.fill_(True)


@add_product_.register_fake
def _(total: Tensor, first: Tensor, second: Tensor, begun: Tensor) -> None: ...
