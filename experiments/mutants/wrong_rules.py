"""Faults of a plan: errors in a sharding rule."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from tpresearch.plan import compiler as planning
from tpresearch.plan import one_rank
from tpresearch.plan.rules import Layouts, ResolvedRule

Patches = Callable[[], AbstractContextManager[Any]]


class BiasOnEachRank(RowwiseParallel):
    """A row-wise layer that adds its bias on every rank, before the sum."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        applied = super()._apply(module, device_mesh)
        module.register_forward_hook(lambda m, args, out: out + (device_mesh.size() - 1) * m.bias.to_local())
        return applied


class UnsummedBackward(ColwiseParallel):
    """A column-wise layer whose input's gradient, a part of a sum on each rank, is taken for the sum."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def prepare(m: nn.Module, args: tuple[Any, ...]) -> Any:
            whole = args[0]
            if not isinstance(whole, DTensor):
                whole = DTensor.from_local(whole, device_mesh, [Replicate()], run_check=False)
            return _TakenForWhole.apply(whole, device_mesh)

        module.register_forward_pre_hook(prepare)  # before torch's own
        return super()._apply(module, device_mesh)


class _TakenForWhole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: DTensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> Any:  # pyrefly: ignore[bad-override]
        return DTensor.from_local(gradient.to_local(), ctx.mesh, [Replicate()], run_check=False), None


def with_style(names: tuple[str, ...], build_style: Callable[[ResolvedRule], ParallelStyle]) -> Patches:
    """The rules of these names carried out by another style than they say."""

    def patches() -> AbstractContextManager[Any]:
        right = ResolvedRule.style

        def style(rule: ResolvedRule) -> ParallelStyle:
            return build_style(rule) if rule.name in names else right(rule)

        return patch.object(ResolvedRule, "style", style)

    return patches


def unsummed_output(rule: ResolvedRule) -> ParallelStyle:
    return RowwiseParallel(input_layouts=rule.src[0], output_layouts=Partial())


def averaged_output(rule: ResolvedRule) -> ParallelStyle:
    class Averaged(RowwiseParallel):
        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            applied = super()._apply(module, device_mesh)
            module.register_forward_hook(lambda m, args, out: out / device_mesh.size())
            return applied

    return Averaged(input_layouts=rule.src[0], output_layouts=rule.dst[0])


def without_rules(*names: str) -> Patches:
    """The plan as if these rules had been forgotten, and the check for it too."""

    def patches() -> AbstractContextManager[Any]:
        stack = ExitStack()
        stack.enter_context(_with_rules(lambda rules: [rule for rule in rules if rule.name not in names]))
        stack.enter_context(patch.object(planning, "check_sequence", lambda *a: None))
        return stack

    return patches


def with_rule(
    name: str, style: str | None = None, src: Layouts | None = None, dst: Layouts | None = None
) -> Patches:
    """The compiled plan with one rule's fields changed."""

    def changed(rule: ResolvedRule) -> ResolvedRule:
        if rule.name != name:
            return rule
        styled = replace(rule.rule, style=style or rule.rule.style)
        return replace(rule, rule=styled, src=src or rule.src, dst=dst or rule.dst)

    return lambda: _with_rules(lambda rules: list(map(changed, rules)))


def _with_rules(change: Callable[[list[ResolvedRule]], list[ResolvedRule]]) -> AbstractContextManager[Any]:
    """Other rules, and no check of what a rank's forward does under them, which would refuse them before verify runs."""
    right, stack = planning._expand_rules, ExitStack()
    stack.enter_context(
        patch.object(planning, "_expand_rules", lambda rules, modules: right(change(rules), modules))
    )
    stack.enter_context(patch.object(one_rank, "check_one_rank", lambda *a: None))
    return stack
