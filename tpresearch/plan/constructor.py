"""Initial values that a model's constructor sets where no `reset_parameters` does: ranks, which draw their own parts, would lose them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tpresearch.config.errors import WrongModel
from tpresearch.plan.initializers import (
    CHANGING_METHODS,
    SETTING_METHODS,
    ElementwiseInitializer,
    Initializer,
)

IN_PLACE = SETTING_METHODS | CHANGING_METHODS | {"constant_", "kaiming_uniform_", "kaiming_normal_", "copy_"}
IN_PLACE |= {"bernoulli_", "random_", "masked_fill_", "index_fill_", "fill_diagonal_", "__setitem__"}


class Change(NamedTuple):
    """A change in place of a tensor's values while a model is built."""

    storage: torch.UntypedStorage
    """Of the tensor; kept, so that no other is found at its address."""
    constant: float | None
    """The value, if it is one for all elements of a whole tensor."""
    setters: frozenset[int]
    """The ids of modules whose `reset_parameters` made it, or that have one of their own, not torch's."""


def change_by(name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> Change | None:
    """What a call of the function of this name changes in place; None if nothing.

    Some functions of torch.nn.init only ask a meta tensor whether it is one (`is_meta`): the question counts as a change.
    """
    target = args[0] if args else kwargs.get("tensor")
    asked = name == "__get__" and sys._getframe(2).f_globals.get("__name__") == nn.init.__name__
    if not isinstance(target, Tensor) or not (asked or name in IN_PLACE):
        return None
    given = {"zero_": 0.0, "fill_": args[1] if len(args) > 1 else None, "constant_": kwargs.get("val")}.get(
        name
    )
    constant = float(given) if isinstance(given, int | float) and target._base is None else None
    setters, frame = set(), sys._getframe(1)
    while frame is not None:
        by = frame.f_locals.get(frame.f_code.co_varnames[0]) if frame.f_code.co_argcount else None
        reset = getattr(type(by), "reset_parameters", None) if isinstance(by, nn.Module) else None
        if reset and (
            frame.f_code.co_name == "reset_parameters" or not reset.__module__.startswith("torch.")
        ):
            setters.add(id(by))
        frame = frame.f_back
    return Change(target.untyped_storage(), constant, frozenset(setters))


def lost_changes(model: nn.Module, changes: Sequence[Change]) -> dict[str, Change]:
    """By name of a parameter, the last change of its values, if no module that has it made it: `reset_parameters` would not."""
    last = {change.storage: change for change in changes}
    owners: dict[int, set[int]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(id(_owner(model, name)))
    found = {name: (p, last.get(p.untyped_storage())) for name, p in model.named_parameters()}
    return {
        name: change for name, (p, change) in found.items() if change and not change.setters & owners[id(p)]
    }


def check_constructor(
    model: nn.Module, lost: Mapping[str, Change], initializers: Mapping[str, Initializer]
) -> None:
    """Refuse a model whose constructor has the last word on a parameter's initial values."""
    for name, change in lost.items():
        if not _is_constant(initializers[name], change):
            kind = type(_owner(model, name)).__name__
            why = f"the model's constructor sets it, and the reset_parameters of its {kind}, by which ranks draw their parts of it, does not"
            legal = f"a class of its own in place of {kind}, with a reset_parameters that sets it, as tpresearch.models.llama2.Linear"
            raise WrongModel(name, why, legal)


def _owner(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name.rpartition(".")[0])


def _is_constant(initializer: Initializer, change: Change) -> bool:
    """Whether both set one and the same value."""
    if not isinstance(initializer, ElementwiseInitializer) or len(initializer.calls) != 1:
        return False
    method, args, _ = initializer.calls[0]
    value = {"zero_": 0.0, "fill_": args[0] if args else None}.get(method)
    return value is not None and value == change.constant
