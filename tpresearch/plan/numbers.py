"""Networks that take numbers instead of tokens: how many a row, and where no gradient flows back."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def input_width(model: nn.Module) -> int | None:
    """Numbers a row that a model takes, as its `input_width` says; None for one that takes tokens."""
    width = getattr(model, "input_width", None)
    return width if isinstance(width, int) else None


def modules_given_numbers(model: nn.Module) -> frozenset[str]:
    """Modules of a meta-device model whose input hangs on no parameter, found by sending a row through it."""
    width = input_width(model)
    if width is None:
        return frozenset()
    found: set[str] = set()

    def look(name: str, args: tuple[object, ...]) -> None:
        if not any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            found.add(name)

    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: look(name, args))
        for name, module in model.named_modules()
    ]
    model(torch.empty(1, width, device="meta", dtype=next(model.parameters()).dtype))
    for hook in hooks:
        hook.remove()
    return frozenset(found)
