"""The forward of one process over a meta model, written down op by op."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tpresearch.plan.compiler import Plan
from tpresearch.plan.meta import same_draws, seen_checkpoints
from tpresearch.plan.parts import COPIES, is_pointwise, name_of
from tpresearch.plan.rules import ResolvedRule

FROM_NUMBERS = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor}
"""Functions that make a tensor of Python's or NumPy's numbers, of which the meta device keeps none."""
PLACES = {"shifts", "diagonal", "index", "k", "pad", "padding"}
"""Arguments that are whole numbers, and neither sizes nor dims."""
NUMBERS = (bool, int, float, np.ndarray, np.generic)


@dataclass(frozen=True)
class Call:
    """An op of one process's forward."""

    name: str
    inputs: list[torch.Size]
    outputs: list[torch.Size]
    numbers: list[float]
    """Its arguments that are no sizes and no dims."""
    start: int
    """Of a slice."""

    @staticmethod
    def of(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Call:
        name = name_of(op)
        inputs, outputs = ([t.shape for t in tensors(each)] for each in ((args, kwargs), output))
        numbers = [each for each in tree_leaves((args, kwargs)) if isinstance(each, float)]
        known = op._schema.arguments
        given = {argument.name: arg for argument, arg in zip(known, args, strict=False)} | kwargs
        for argument in known:
            if is_pointwise(op) or _is_number(name, argument):
                numbers += [each for each in tree_leaves(given.get(argument.name)) if type(each) is int]
        start = args[2] if name == "slice" and len(args) > 2 else None
        return Call(name, inputs, outputs, numbers, start or 0)


def _is_number(op: str, argument: Any) -> bool:
    """Whether a whole number as this argument is neither a size nor a dim; the end of `arange` is its output's size."""
    if (op, argument.name) == ("arange", "end"):
        return False
    return isinstance(argument.type, torch.NumberType) or argument.name in PLACES


def tensors(values: object) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


class _FromNumbers(TorchFunctionMode):
    """Hands on the numbers of which tensors are made."""

    def __init__(self, note: Callable[[list[float], Tensor], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in FROM_NUMBERS:
            given = (x for x in tree_leaves((args, kwargs)) if isinstance(x, NUMBERS))
            self._note([number for x in given for number in np.ravel(x).tolist()], output)
        return output


class Forward(TorchDispatchMode):
    """The forward of one process, but for what happens in layers whose weights a rule shards; its ops are written down. Blocks like
    one that was called in the same way are passed over."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.model, self.calls, self._unseen = copy.deepcopy(model), list[Call](), 0
        self.blocks: list[tuple[bool, list[Call]]] = []
        """By call of a block: whether it was passed over, and the calls in it."""
        self._known: dict[object, tuple[Any, list[Call]]] = {}
        for name, module in self.model.named_modules():
            rule = plan.rules.get(name)
            module.register_forward_pre_hook(partial(self._before, name, rule))
            module.register_forward_hook(partial(self._after, name, rule))
        for name in plan.blocks:
            block = self.model.get_submodule(name)
            block.forward = partial(self._run_block, _kind(name, block, plan), block.forward)

    def run(self, inputs: Tensor) -> Any:
        with torch.device("meta"), same_draws(), seen_checkpoints(), self, _FromNumbers(self._made):
            return self.model(inputs)

    def _made(self, numbers: list[float], output: Tensor) -> None:
        if not self._unseen:
            self.made(Call("tensor", [], [output.shape], numbers, 0))

    def made(self, call: Call) -> None:
        """A tensor was made of numbers."""
        self.calls.append(call)

    def _before(self, name: str, rule: ResolvedRule | None, module: nn.Module, args: Any) -> Any:
        with self._out_of_sight():
            args = self.entered(name, rule, args)
        self._unseen += splits(rule, module)
        return args

    def _after(self, name: str, rule: ResolvedRule | None, module: nn.Module, args: Any, output: Any) -> Any:
        self._unseen -= splits(rule, module)
        with self._out_of_sight():
            return self.left(name, rule, module, output)

    @contextmanager
    def _out_of_sight(self) -> Iterator[None]:
        self._unseen += 1
        yield
        self._unseen -= 1

    def _run_block(self, kind: object, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = [self.state_of(x) if isinstance(x, Tensor) else repr(x) for x in tree_leaves((args, kwargs))]
        key = kind, *given
        if self.passes_over(key in self._known):
            output, calls = self._known[key]
            self.blocks.append((True, calls))
            with self._out_of_sight():
                return tree_map_only(Tensor, self.like, output)
        self.blocks.append((False, calls := []))
        outer, self.calls = self.calls, calls
        output = forward(*args, **kwargs)
        self.calls = outer + calls
        self._known[key] = output, calls
        return output

    def entered(self, name: str, rule: ResolvedRule | None, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What a module gets for its arguments."""
        return args

    def left(self, name: str, rule: ResolvedRule | None, module: nn.Module, output: Any) -> Any:
        """What its caller gets for its output."""
        return output

    def state_of(self, x: Tensor) -> object:
        """All that is known of a tensor."""
        return x.shape, x.dtype, x.requires_grad

    def like(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape).requires_grad_(x.requires_grad)

    def passes_over(self, known: bool) -> bool:
        return known

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if not self._unseen:
            self.note(func, args, kwargs or {}, output)
        return output

    def note(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if name_of(op) not in COPIES:
            self.calls.append(Call.of(op, args, kwargs, output))


def _kind(name: str, block: nn.Module, plan: Plan) -> str:
    """What blocks with the same code, settings, shapes and rules have in common."""
    torchs, found = vars(nn.Module()), list[object]()
    for inner, module in block.named_modules():
        settings = {
            key: value for key, value in vars(module).items() if key not in torchs or key == "training"
        }
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        rule = plan.rules.get(f"{name}.{inner}".rstrip("."))
        found.append(
            (inner, type(module), settings, [(key, t.shape) for key, t in tensors], rule and rule.name)
        )
    return repr(found)


def splits(rule: ResolvedRule | None, module: nn.Module) -> bool:
    return rule is not None and rule.weight_dim(module) is not None
