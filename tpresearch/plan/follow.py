"""Follows what a rank holds of sharded tensors through the ops of a forward, and refuses those that would compute something else on
it than one process on all of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from tpresearch.config.errors import ConfigError, WrongModel
from tpresearch.config.schema import Config
from tpresearch.plan.compiler import Plan
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
from tpresearch.plan.rules import SEQUENCE, Shard
from tpresearch.plan.sequence import rule_to_add


class AnotherWay(Exception):
    """A rank's forward calls other functions than that of one process, or has sizes of its own: not followed any further."""


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
        kinds = (int, float) if is_pointwise(op) or name == "full" else float
        numbers = [
            each
            for each in tree_leaves((args, kwargs))
            if isinstance(each, kinds) and not isinstance(each, bool)
        ]
        start = args[2] if name == "slice" and len(args) > 2 else None
        return Call(name, inputs, outputs, numbers, start or 0)


def tensors(values: object) -> list[Tensor]:
    return [each for each in tree_leaves(values) if isinstance(each, Tensor)]


class Follower:
    """What is known of the tensors of one rank's forward."""

    def __init__(self, plan: Plan, cfg: Config, ranks: int) -> None:
        self._plan, self._cfg, self.ranks = plan, cfg, ranks
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
                self._refuse(
                    f"{own.name}{self._where()} takes a DTensor, which a sharding rule leaves there, and a plain tensor"
                )
            self.distributed.update(dict.fromkeys(outputs, True))
            return
        if own.numbers != whole.numbers:
            why = f"{own.name}{self._where()} takes a number that follows from a size, and is another one on a rank's shard"
            self._refuse(why)
        held = {x: self.parts[x] for x in inputs if x in self.parts and own.name not in UNIFORM}
        met = next((part for part in held.values() if part.run), None)
        if met:
            self._check_gradients(own.name, inputs, met)
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
        if part.run is None or part.dim not in dims_along(op, args, kwargs, x):
            return part.run
        run = None
        if own.name == "cat":
            each = [self.parts.get(one) for one in args[0]]
            run = (
                part.run if all(one and (one.dim, one.run) == (part.dim, part.run) for one in each) else None
            )
        elif own.name in SLICES:
            whole_sizes, own_sizes = ([shape[part.dim] for shape in call.outputs] for call in (whole, own))
            step = args[4] if own.name == "slice" and len(args) > 4 else 1
            run = pieces(part.run, self.ranks, whole_sizes, own_sizes, whole.start, own.start, step)
        return run or self._refuse_op(own.name, part)

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
            self._refuse_op(name, part)
        (dim,), found = divided, list[Part]()
        for x, part in held.items():
            moved = Part(dim, runs[x], part.layer)
            if part.run is None:
                pass
            elif name in RESHAPES:
                before = [size * self.ranks if at == part.dim else size for at, size in enumerate(x.shape)]
                kept = reshaped(part, before, whole, self.ranks)
                if kept is None or kept.dim != dim or out.shape[dim] * self.ranks != whole[dim]:
                    self._refuse_view(name, part, whole, out.shape)
                moved = kept
            elif (name in TRANSPOSES and transposed(part.dim, name, args, x.dim()) != dim) or (
                is_pointwise(op) and part.dim + out.dim() - x.dim() != dim
            ):
                self._refuse_pair(name, held)
            found.append(moved)
        if len({each.run for each in found} - {None}) > 1:
            self._refuse_pair(name, held)
        return max(found, key=lambda each: each.run is not None)

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
            self._refuse(
                f"{name}{self._where()} has as many elements as a tensor has there, and those of a rank's shard "
                f"are the first {size} of {whole[dim]} on each rank"
            )
        if len(divided) > 1:
            raise AnotherWay
        return Part(dim, None, "")

    def _check_gradients(self, name: str, inputs: list[Tensor], met: Part) -> None:
        """Refuse what is whole on each rank and meets a shard: its gradient is that of this rank's shard alone."""
        plan, shard = (
            self._cfg.parallel.tensor,
            f"a shard of the output of {met.layer}" if met.layer else "the size of a shard",
        )
        for x in inputs:
            if not x.requires_grad or x in self.parts:
                continue
            if x in self.layers:
                why = (
                    f"what {self.layers[x]} has given is whole on each rank and meets {shard} ({name}{self._where()}), "
                    "so that its gradient is partial"
                )
                legal = "a rule for its module with a style by which that is summed, as CopyToShards in docs/plans.md"
                raise ConfigError(f"model.plans.{plan}", plan, why, legal, fix={})
            module, dim = self.running[-1]
            rule = self._plan.rules.get(module)
            if rule is None or rule.rule.style != "sequence":
                why = f"a parameter of {module or 'the model'} is whole on each rank and meets {shard} ({name}), so that its gradient is partial"
                legal = (
                    "a rule for its module by which partial gradients are summed: style sequence, with the dim that is "
                    "sharded there as src and dst, such as shard:2"
                )
                fix = {} if rule or dim is None else rule_to_add(self._cfg, module, f"shard:{dim}")
                raise ConfigError(f"model.plans.{plan}", plan, why, legal, fix)

    def _where(self) -> str:
        module, _ = self.running[-1]
        return f" in {module}" if module else ""

    def _refuse_op(self, name: str, part: Part) -> NoReturn:
        name = name.strip("_")
        if not part.layer:
            self._refuse(
                f"{name}{self._where()} works along a dim with as many elements as a rank's shard has"
            )
        rule = self._plan.rules[part.layer]
        layout = next(each for each in rule.dst if isinstance(each, Shard))
        key, value = f"{rule.config_key}.dst", rule.rule.dst or f"shard:{layout.dim}"
        if layout == SEQUENCE and self._cfg.data.has_sequence:
            why = (
                f"{name}{self._where() or ' in the model'} needs all positions of the output of {part.layer}, and each rank would "
                "apply it to its part of the sequence alone"
            )
            legal = "parallel.tensor=tp, or a module of its own for that, with a rule whose _target_ is a ParallelStyle that gathers its input"
            fix: dict[str, object] = {"parallel.tensor": "tp"} if "tp" in self._cfg.model.plans else {}
            raise ConfigError(key, value, why, legal, fix=fix)
        why = f"{name} needs all features of the output of {part.layer}, and each rank would apply it to its shard alone"
        legal = "replicate; or in the model a layer of its own for each part, or heads in a dim of their own before it"
        raise ConfigError(key, value, why, legal, fix={key: "replicate"})

    def _refuse_pair(self, name: str, held: dict[Tensor, Part]) -> NoReturn:
        layers = " and ".join(dict.fromkeys(part.layer for part in held.values() if part.layer))
        why = f"{name.strip('_')}{self._where()} takes shards of {layers}, and a rank's elements of them do not belong together"
        self._refuse(why)

    def _refuse_view(self, name: str, part: Part, whole: torch.Size, own: torch.Size) -> NoReturn:
        why = (
            f"{name}{self._where()} makes {'x'.join(map(str, whole))} of the output of {part.layer}, and of one of {self.ranks} "
            f"ranks' shards {'x'.join(map(str, own))}, which is no part of that"
        )
        legal = "a number of heads that follows from the tensor, before what each head has several of, as in view(b, s, -1, 3, head_dim)"
        raise WrongModel(self._cfg.model.name, why, legal)

    def _refuse(self, why: str) -> NoReturn:
        raise WrongModel(
            self._cfg.model.name, why, "a forward that computes the same on shards as on whole tensors"
        )
