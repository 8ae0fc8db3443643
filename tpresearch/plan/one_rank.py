"""The forward of one rank, on the meta device, beside that of one process: what is sharded is followed from the layer that a rule
has sharded, op by op, to the rule that takes it.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Placement, Shard

from tpresearch.config.errors import ConfigError, WrongModel, one_line, place_of
from tpresearch.config.schema import Config
from tpresearch.plan.compiler import Plan
from tpresearch.plan.follow import AnotherWay, Follower
from tpresearch.plan.forward import Call, Forward, splits, tensors
from tpresearch.plan.parts import COPIES, Part, name_of
from tpresearch.plan.rules import ResolvedRule
from tpresearch.plan.wrong_on_shards import AcrossRows, Refusals, RowRefusals


class _OneRank(Forward):
    """That of one of a job's ranks, whose ops are compared with the calls of one process."""

    def __init__(self, model: nn.Module, plan: Plan, whole: Forward, known: Follower) -> None:
        super().__init__(model, plan)
        self._whole, self._whole_blocks = iter(whole.calls), iter(whole.blocks)
        self.known = known
        for name, rule in plan.rules.items():
            if splits(rule, module := self.model.get_submodule(name)):
                self.known.distributed.update(dict.fromkeys(module.parameters(recurse=False), True))

    def note(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if name_of(op) in COPIES:
            self.known.copied(args[0], output)
        else:
            self.known.called(self._of_one_process(), op, args, kwargs, output)

    def made(self, call: Call) -> None:
        self.known.made(self._of_one_process(), call)

    def _of_one_process(self) -> Call:
        """Its next call."""
        if call := next(self._whole, None):
            return call
        raise AnotherWay

    def state_of(self, x: Tensor) -> object:
        part = self.known.parts.get(x)
        return (
            super().state_of(x),
            x in self.known.distributed,
            x in self.known.layers,
            part and (part.dim, part.run),
        )

    def like(self, x: Tensor) -> Tensor:
        self.known.copied(x, other := super().like(x))
        return other

    def passes_over(self, known: bool) -> bool:
        passed_over, calls = next(self._whole_blocks, (False, []))
        if passed_over and not known:
            self._whole = chain(calls, self._whole)
        return passed_over and known

    def entered(self, name: str, rule: ResolvedRule | None, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given = list(args)
        for at, (layout, x) in enumerate(zip(rule.src if rule else (), args, strict=False)):
            if rule is None or rule.rule.style == "output" or layout is None or not isinstance(x, Tensor):
                continue
            self._check_layout(f"the input of {name or 'the model'}", rule, layout, x)
            if rule.rule.style != "sequence":
                given[at] = self._whole_of(x)
                self.known.distributed[given[at]] = True
            elif x in self.known.distributed:
                given[at] = self._own(x, layout, name)
        parts = (self.known.parts.get(x) for x in given if isinstance(x, Tensor))
        self.known.running.append((name, next((part.dim for part in parts if part), None)))
        return tuple(given)

    def left(self, name: str, rule: ResolvedRule | None, module: nn.Module, output: Any) -> Any:
        known = self.known
        known.running.pop()
        if rule is not None and rule.output_stays_sharded:
            known.distributed[output] = True
        elif rule is not None and splits(rule, module):
            assert rule.dst[0]
            return self._own(output, rule.dst[0], name)
        elif rule is not None and rule.rule.style == "output":
            outputs = list(output) if isinstance(output, tuple) else [output]
            for at, (src, dst, x) in enumerate(zip(rule.src, rule.dst, outputs, strict=False)):
                if src and dst and isinstance(x, Tensor):
                    self._check_layout(f"the output of {name or 'the model'}", rule, src, x)
                    outputs[at] = self._own(self._whole_of(x), dst, name)
            return tuple(outputs) if isinstance(output, tuple) else outputs[0]
        elif any(True for _ in module.parameters(recurse=False)):
            known.layers.update(dict.fromkeys(tensors(output), name))
        return output

    def _own(self, whole: Tensor, layout: Placement, layer: str) -> Tensor:
        """What a rank has of a tensor in this layout."""
        shape, dim = [*whole.shape], layout.dim % whole.dim() if isinstance(layout, Shard) else None
        if dim is not None:
            if shape[dim] % self.known.ranks:
                raise AnotherWay
            shape[dim] //= self.known.ranks
        own = whole.new_empty(shape).requires_grad_(whole.requires_grad)
        own = own.clone()  # which may be changed in place
        if dim is None:
            self.known.layers[own] = layer
        else:
            self.known.parts[own] = Part(dim, shape[dim], layer)
        return own

    def _whole_of(self, x: Tensor) -> Tensor:
        part, shape = self.known.parts.get(x), [*x.shape]
        if part:
            shape[part.dim] *= self.known.ranks
        return x.new_empty(shape).requires_grad_(x.requires_grad)

    def _check_layout(self, what: str, rule: ResolvedRule, layout: Placement, x: Tensor) -> None:
        """Refuse a `src` that is not the layout which a tensor has."""
        part = self.known.parts.get(x)
        claimed = layout.dim % x.dim() if isinstance(layout, Shard) else None
        if x in self.known.distributed or (part is None and claimed is None):
            return
        keys = ["src", "dst"] if rule.rule.style == "sequence" else ["src"]
        legal, has = "replicate", "is whole on each rank"
        if part:
            is_plain = part.run in (None, x.shape[part.dim])
            if is_plain and part.dim == claimed:
                return
            legal, has = f"shard:{part.dim}", f"is a shard of the output of {part.layer} along dim {part.dim}"
            if not is_plain:
                has = f"has elements of the output of {part.layer} that lie apart from each other on one rank"
                legal, keys = "a forward that keeps a shard's elements together", []
        elif rule.rule.style == "sequence":
            legal, keys = "a layer with a whole input takes style input, with src and dst [null]", []
        given = rule.rule.src or (f"shard:{layout.dim}" if isinstance(layout, Shard) else "replicate")
        plus = {key: "" if getattr(rule.rule, key) else "+" for key in keys}
        fix = (
            None
            if isinstance(given, list)
            else {f"{plus[key]}{rule.config_key}.{key}": legal for key in keys}
        )
        raise ConfigError(f"{rule.config_key}.src", given, f"{what} {has}", legal, fix or None)


def check_one_rank(model: nn.Module, plan: Plan, inputs: Tensor, cfg: Config) -> str | None:
    """Refuse a plan under which the forward of a rank is not that of one process on what it holds: an op along a dim that is
    sharded, a layout that a tensor does not have, shards that do not belong together, a gradient that stays partial.

    Nothing is known of what a user's own ParallelStyle leaves: with one, nothing is checked.

    Args:
        model: on the meta device, whole. inputs: a micro-batch, on the meta device.

    Returns: the line of the model's code from which on nothing is checked, since there a rank's forward calls other functions than
        that of one process; None if all of it is.
    """
    rules = plan.rules.values()
    if not rules or plan.probe.output is None or any(rule.rule.target for rule in rules):
        return None
    whole, plan = _one_process(model, plan, inputs)
    ranks = max(plan.sizes[rule.axis] for rule in rules)
    rank = _OneRank(model, plan, whole, Follower(ranks, Refusals(plan, cfg)))
    try:
        output = rank.run(inputs)
    except AnotherWay as other:
        return place_of(other)
    except (RuntimeError, ValueError, TypeError) as error:
        raise does_not_fit(cfg.model.name, error) from error
    if isinstance(output, Tensor) and (part := rank.known.parts.get(output)):
        rule = plan.rules[part.layer]
        why = f"the model's output is a shard of that of {part.layer}, and the loss needs all of it"
        key = f"{rule.config_key}.dst"
        raise ConfigError(key, rule.rule.dst, why, "logits, or replicate", fix={key: "replicate"})
    return None


def op_across_rows(model: nn.Module, plan: Plan, inputs: Tensor, cfg: Config) -> str | None:
    """The first op that works across the rows of a batch, and its module, as `mean in blocks.0`; None if there is none."""
    if plan.probe.output is None:
        return None
    whole, plan = _one_process(model, replace(plan, rules={}), torch.cat([inputs, inputs]))
    known = Follower(2, RowRefusals(plan, cfg))
    known.parts[inputs] = Part(0, len(inputs), "")
    try:
        with suppress(AnotherWay):
            _OneRank(model, plan, whole, known).run(inputs)
    except AcrossRows as found:
        return str(found)
    return None


def _one_process(model: nn.Module, plan: Plan, inputs: Tensor) -> tuple[Forward, Plan]:
    """The forward of one process, and the plan under which a rank's may be followed beside it: without blocks, where one may not be
    passed over, since a gradient is taken through it, or a transform of torch.func calls it."""
    whole = Forward(model, plan)
    try:
        whole.run(inputs)
    except Exception:  # torch's, or of the user's code; the probe ran all of it
        plan = replace(plan, blocks=[])
        whole = Forward(model, plan)
        whole.run(inputs)
    return whole, plan


def does_not_fit(model: str, error: Exception) -> WrongModel:
    """For a forward that runs whole, and not on a rank's shards: with the line of the model's code."""
    why = f"it runs whole, but on a rank's shards ends at {place_of(error)}: {one_line(error)}"
    legal = (
        "a forward that takes sizes from its tensors, as view(b, s, -1, head_dim) does for the heads that a rank has, "
        "and a rule for each layer that a shard reaches, as rowwise after colwise"
    )
    return WrongModel(model, why, legal)
