"""Follows what a rank holds of sharded tensors through the ops of a forward, and refuses those that would compute something else on
it than one process on all of it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from tpresearch.plan.forward import Call, tensors
from tpresearch.plan.parts import (
    RESHAPES,
    SLICES,
    TRANSPOSES,
    UNIFORM,
    Part,
    dims_along,
    is_pointwise,
    name_of,
    pieces,
    reshaped,
    transposed,
)
from tpresearch.plan.wrong_on_shards import LOCAL_INPUT, Refusals


class AnotherWay(Exception):
    """A rank's forward calls other functions than that of one process, or has sizes of its own: not followed any further."""


class Follower:
    """What is known of the tensors of one rank's forward."""

    def __init__(self, ranks: int, refuse: Refusals) -> None:
        self.ranks, self._refuse = ranks, refuse
        self.parts = WeakTensorKeyDictionary()
        """Tensors of which each rank holds its part."""
        self.distributed = WeakTensorKeyDictionary()
        """DTensors: their ops send what they need."""
        self.layers = WeakTensorKeyDictionary()
        """Tensors that are whole on each rank -> the layer that they come from; parameters come from none."""
        self.running: list[tuple[str, int | None]] = []
        """Names of the modules that are called, the innermost last, and along which dim their input is a shard."""

    def called(
        self, whole: Call, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """A rank has called an op, where one process made the call `whole`.

        Raises:
            ConfigError: if its results are not the rank's parts of that call's.
            AnotherWay: if it is not the same op.
        """
        own, inputs, outputs = Call.of(op, args, kwargs, output), tensors((args, kwargs)), tensors(output)
        if (own.name, len(own.inputs)) != (whole.name, len(whole.inputs)):
            raise AnotherWay
        if any(x in self.distributed for x in inputs):
            if any(x.dim() and x not in self.distributed for x in inputs):
                what = "takes a DTensor, which a sharding rule leaves there, and a plain tensor"
                self._refuse.other(*self._at(own.name), what, LOCAL_INPUT)
            self.distributed.update(dict.fromkeys(outputs, True))
            return
        self._check_numbers(whole, own)
        held = {x: self.parts[x] for x in inputs if x in self.parts and own.name not in UNIFORM}
        along = any(part.dim in dims_along(op, args, kwargs, x) for x, part in held.items())
        if own.start != whole.start and not along:
            self._refuse_number(own.name)
        runs = {x: self._run_after(x, part, op, args, kwargs, whole, own) for x, part in held.items()}
        if len(own.outputs) != len(whole.outputs):
            raise AnotherWay
        layer = next((self.layers[x] for x in inputs if x in self.layers), None)
        for out, shape in zip(outputs, whole.outputs, strict=True):
            if len(shape) != out.dim():
                raise AnotherWay
            divided = [dim for dim, size in enumerate(shape) if size != out.shape[dim]]
            if held:
                self.parts[out] = self._part(op, args, held, runs, out, shape, divided)
            elif divided:
                self.parts[out] = self._part_of_a_size(op, inputs, out, shape, divided)
            elif layer is not None:
                self.layers[out] = layer
        if held:
            self._check_gradients(own.name, inputs, _first_known(held.values()))

    def made(self, whole: Call, own: Call) -> None:
        """A rank has made a tensor of numbers, where one process made the call `whole`; raises as `called` does."""
        if own.name != whole.name:
            raise AnotherWay
        self._check_numbers(whole, own)

    def _check_numbers(self, whole: Call, own: Call) -> None:
        if own.numbers != whole.numbers:
            self._refuse_number(own.name)

    def _refuse_number(self, name: str) -> NoReturn:
        what = "takes a number that follows from a size, and is another one on a rank's shard"
        self._refuse.other(*self._at(name), what)

    def _at(self, name: str) -> tuple[str, str]:
        """An op's name for people, and the module that calls it."""
        return name.strip("_"), self.running[-1][0]

    def copied(self, x: Tensor, copy: Tensor) -> None:
        for known in (self.parts, self.distributed, self.layers):
            if x in known:
                known[copy] = known[x]

    def _run_after(
        self,
        x: Tensor,
        part: Part,
        op: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        whole: Call,
        own: Call,
    ) -> int | None:
        """The run of an op's outputs for one of its inputs; refuses an op that works along the dim that is divided."""
        if part.dim not in dims_along(op, args, kwargs, x):
            return part.run
        if own.name in SLICES:
            if part.run is None:
                return None
            whole_sizes, own_sizes = ([shape[part.dim] for shape in call.outputs] for call in (whole, own))
            step = args[4] if own.name == "slice" and len(args) > 4 else 1
            if run := pieces(part.run, self.ranks, whole_sizes, own_sizes, whole.start, own.start, step):
                return run
        return self._refuse.along(*self._at(own.name), part.layer)

    def _part(
        self,
        op: Any,
        args: tuple[Any, ...],
        held: dict[Tensor, Part],
        runs: dict[Tensor, int | None],
        out: Tensor,
        whole: torch.Size,
        divided: list[int],
    ) -> Part:
        """What a rank has in the output of an op on parts: of the one dim in which it is not whole."""
        name, part = name_of(op), next(iter(held.values()))
        if len(divided) != 1:
            if name in TRANSPOSES:  # of other dims, as einsum calls it where a rank has one head
                raise AnotherWay
            self._refuse.along(*self._at(name), part.layer)
        (dim,), found = divided, list[Part]()
        if name not in RESHAPES and out.shape[dim] * self.ranks != whole[dim]:
            self._refuse.along(*self._at(name), part.layer)
        for x, part in held.items():
            moved = Part(dim, runs[x], part.layer)
            if part.run is None:
                pass
            elif name in RESHAPES:
                before = [size * self.ranks if at == part.dim else size for at, size in enumerate(x.shape)]
                kept = reshaped(part, before, whole, self.ranks)
                if kept is None or kept.dim != dim or out.shape[dim] * self.ranks != whole[dim]:
                    self._refuse.view(*self._at(name), part.layer, whole, out.shape, self.ranks)
                moved = kept
            elif (name in TRANSPOSES and transposed(part.dim, name, args, x.dim()) != dim) or (
                is_pointwise(op) and part.dim + out.dim() - x.dim() != dim
            ):
                self._refuse.pair(*self._at(name), [each.layer for each in held.values()])
            found.append(moved)
        if len({each.run for each in found} - {None}) > 1:
            self._refuse.pair(*self._at(name), [each.layer for each in held.values()])
        return _first_known(found)

    def _part_of_a_size(
        self, op: Any, inputs: list[Tensor], out: Tensor, whole: torch.Size, divided: list[int]
    ) -> Part:
        """What a rank has in a tensor that is made of none that is divided, but in the size of one."""
        name, dim = name_of(op), divided[0]
        own = dim - out.dim() + inputs[0].dim() if name in ("expand", "repeat") and inputs else None
        if own is not None and (own < 0 or inputs[0].shape[own] == 1):
            self._check_gradients(name, inputs, Part(dim, None, ""))
        elif name not in UNIFORM and torch.Tag.nondeterministic_seeded not in op.tags:
            size = out.shape[dim]
            own_are = f"those of a rank's shard are the first {size} of {whole[dim]} on each rank"
            self._refuse.other(*self._at(name), f"has as many elements as a tensor has there, and {own_are}")
        if len(divided) > 1:
            raise AnotherWay
        return Part(dim, None, "")

    def _check_gradients(self, name: str, inputs: list[Tensor], met: Part) -> None:
        """Refuse what is whole on each rank and meets a shard, where it has a gradient."""
        module, dim = self.running[-1]
        for x in inputs:
            if not x.requires_grad or x in self.parts:
                continue
            if x in self.layers:
                self._refuse.partial_activation(name, module, self.layers[x], met.layer)
            else:
                self._refuse.partial_parameter(name, module, dim, met.layer)


def _first_known(parts: Collection[Part]) -> Part:
    """The first of which it is known which elements a rank has; else the first."""
    return max(parts, key=lambda part: part.run is not None)
