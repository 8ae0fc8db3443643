"""A sharding rule: its layouts, checked against the tensors of a forward pass over shapes; what it does to a weight; and its
ParallelStyle.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
)
from torch.utils._pytree import tree_map_only

from tpresearch.config.axes import LAYER_AXES
from tpresearch.config.errors import ConfigError, one_line
from tpresearch.config.mesh import SEQUENCE_DIM
from tpresearch.config.model import Rule
from tpresearch.config.near_names import nearest
from tpresearch.config.values import imported_class, instantiate
from tpresearch.plan.probe import CallShapes, Probe

OUTPUT_LAYOUTS = {"logits": Shard(-1), "batch": Shard(0)}
"""Layouts of a model's output that the loss can use: sharded over the vocabulary, or over the batch's rows."""

Layouts = tuple[Placement | None, ...]
WeightDims = dict[type[nn.Module], int]


class LocalSequenceParallel(ParallelStyle):
    """Run a layer on this rank's part of the sequence, with replicated weights and partial gradients.

    torch's SequenceParallel makes the weights DTensors, whose gradients FSDP then sums over tp after every
    micro-batch, before it shards them. Here they stay plain, and the step sums their shards once
    (`Plan.partial_grads`, `reduce_partial_gradients`).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(self._local_part)
        return module

    def _local_part(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tree_map_only(DTensor, lambda x: x.redistribute(placements=[Shard(self.dim)]).to_local(), args)


@dataclass(frozen=True)
class Style:
    """What one of the five styles of a rule means."""

    build: Callable[[Any, Any, bool], ParallelStyle]
    """(src, dst, whether the output becomes a plain local tensor) -> torch's style."""
    default_src: Placement | None = None
    default_dst: Placement | None = None
    weight_dims: WeightDims = field(default_factory=dict)
    """The dim of a weight that is split, for each kind of layer that the style can split."""


def _split_style(style: type[ColwiseParallel | RowwiseParallel]) -> Callable[[Any, Any, bool], ParallelStyle]:
    return lambda src, dst, local: style(input_layouts=src[0], output_layouts=dst[0], use_local_output=local)


# Weights are [out, in]: splitting the columns of the tutorial's B in A = XB is splitting dim 0 here.
COLWISE_DIMS: WeightDims = {nn.Linear: 0, nn.Embedding: 1}
ROWWISE_DIMS: WeightDims = {nn.Linear: 1, nn.Embedding: 0}
SEQUENCE = Shard(SEQUENCE_DIM)
STYLES: dict[str, Style] = {
    "colwise": Style(_split_style(ColwiseParallel), Replicate(), Shard(-1), COLWISE_DIMS),
    "rowwise": Style(_split_style(RowwiseParallel), Shard(-1), Replicate(), ROWWISE_DIMS),
    "sequence": Style(lambda src, dst, local: LocalSequenceParallel(src[0].dim), SEQUENCE, SEQUENCE),
    "input": Style(lambda src, dst, local: PrepareModuleInput(input_layouts=src, desired_input_layouts=dst)),
    "output": Style(
        lambda src, dst, local: PrepareModuleOutput(output_layouts=src, desired_output_layouts=dst)
    ),
}


@dataclass(frozen=True)
class ResolvedRule:
    """A rule with its layouts resolved, ready to be applied to the modules it matches."""

    name: str
    config_key: str
    """Its config key, for messages: model.plans.<plan>.<name>."""
    rule: Rule
    src: Layouts
    dst: Layouts
    output_stays_sharded: bool
    """The output is the model's and stays sharded for the loss."""

    @property
    def axis(self) -> str:
        """The mesh axis it acts on."""
        return self.rule.axis

    @property
    def label(self) -> str:
        return self.rule.style or str(self.rule.target).rsplit(".", 1)[-1]

    @property
    def shards_sequence(self) -> bool:
        """An activation is split along the sequence on its way in or out."""
        return Shard(SEQUENCE_DIM) in (*self.src, *self.dst)

    @property
    def shards_batch(self) -> bool:
        """An activation is split by the batch's rows on its way in or out."""
        return Shard(0) in (*self.src, *self.dst)

    def weight_dim(self, module: nn.Module) -> int | None:
        """The dim of `module.weight` that is sharded, or None if the weight stays replicated."""
        shards = STYLES[self.rule.style].weight_dims if self.rule.style else {}
        return next((dim for kind, dim in shards.items() if isinstance(module, kind)), None)

    def style(self) -> ParallelStyle:
        """The ParallelStyle that torch's parallelize_module takes."""
        if self.rule.target:
            return instantiate({"_target_": self.rule.target, **self.rule.args})
        assert self.rule.style
        return STYLES[self.rule.style].build(self.src, self.dst, not self.output_stays_sharded)


def runs_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether its forward is that of this class: not one of its own class's, and not one that was set on the object."""
    return getattr(module.forward, "__func__", None) is kind.forward


def can_chunk_logits(layer: nn.Module, rule: ResolvedRule | None) -> bool:
    """Whether logits can be computed for a few tokens at a time: by a plain matmul, on vocabulary shards if the rule has some."""
    if not isinstance(layer, nn.Linear) or not runs_as(layer, nn.Linear) or layer.bias is not None:
        return False
    if any(
        (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    ):
        return False  # they see calls of the layer, of which there would be none
    if rule is None:
        return True
    return rule.rule.style == "colwise" and rule.output_stays_sharded and rule.dst[0] == Shard(-1)


def resolve_rule(plan: str, name: str, rule: Rule, loss_parallel: bool) -> ResolvedRule:
    """Resolve a rule's style and layouts.

    Raises:
        ConfigError: for an unknown style, layout or import path, arguments that a style of one's own does not take, or a rule that lacks
            what its style needs.
    """
    where = f"model.plans.{plan}.{name}"
    if rule.axis not in LAYER_AXES:
        legal = "one of " + ", ".join(LAYER_AXES)
        raise ConfigError(f"{where}.axis", rule.axis, "not an axis that rules act on", legal)
    if rule.target:
        kind = imported_class(f"{where}._target_", rule.target, ParallelStyle)
        if rule.style is not None:
            why = f"the rule's _target_, {kind.__name__}, is a style of its own"
            raise ConfigError(
                f"{where}.style",
                rule.style,
                why,
                "null beside a _target_",
                {f"{where}.style": None, f"{where}._target_": None},
            )
        own = ResolvedRule(name, where, rule, (), (), False)
        try:
            own.style()
        except Exception as error:  # it is user code, which may raise anything
            why = f"{kind.__name__} refuses the rule's other keys: {one_line(error.__cause__ or error)}"
            fix = {f"{where}.{key}": None for key in rule.args}
            legal = "keys that are its arguments"
            raise ConfigError(f"{where}._target_", rule.target, why, legal, fix) from error
        return own
    if rule.style not in STYLES:
        why, legal = "no such style", "one of " + ", ".join(nearest(str(rule.style), STYLES))
        raise ConfigError(f"{where}.style", rule.style, why, legal)
    assert rule.style
    style = STYLES[rule.style]
    src = _layouts(f"{where}.src", rule.src, style.default_src, loss_parallel)
    dst = _layouts(f"{where}.dst", rule.dst, style.default_dst, loss_parallel)
    if rule.style in ("input", "output") and (len(src) != len(dst) or None in (rule.src, rule.dst)):
        why = f"style {rule.style} turns each src layout into a dst layout"
        legal = "src and dst lists of one length, null for a tensor left alone"
        fix = {f"{where}.src": None, f"{where}.dst": None}
        raise ConfigError(where, f"{rule.src} -> {rule.dst}", why, legal, fix=fix)
    return ResolvedRule(name, where, rule, src, dst, str(rule.dst) in OUTPUT_LAYOUTS and loss_parallel)


def _layouts(
    where: str, given: str | list[str | None] | None, default: Placement | None, loss_parallel: bool
) -> Layouts:
    if given is None:
        return (default,)
    return tuple(
        _layout(where, item, loss_parallel) for item in (given if isinstance(given, list) else [given])
    )


def _layout(where: str, text: str | None, loss_parallel: bool) -> Placement | None:
    if text is None:
        return None
    if text in OUTPUT_LAYOUTS:
        return OUTPUT_LAYOUTS[text] if loss_parallel else Replicate()
    if text == "replicate":
        return Replicate()
    if match := re.fullmatch(r"shard:(-?\d{1,2})", text, re.ASCII):
        return Shard(int(match[1]))
    raise ConfigError(where, text, "no such layout", "replicate, shard:N, logits, batch or null")


def check_layouts(rules: dict[str, ResolvedRule], probe: Probe) -> None:
    """Refuse layouts that torch would reject only in the first step.

    Args:
        rules: by module name. probe: what has not been called there is not checked.
    """
    for name, rule in rules.items():
        if rule.rule.target:
            continue
        shapes = probe.shapes.get(name)
        if shapes is not None and not shapes.inputs and rule.rule.style != "output":
            why = f"{name} is given no input by position"
            legal = "a call that does so; for a module that takes none, such as one that has a factor for others, a _target_ like CopyToShards in docs/plans.md"
            raise ConfigError(f"{rule.config_key}.match", rule.rule.match, why, legal)
        if rule.rule.style not in ("input", "output"):
            _check_layer_layouts(rule)
        elif shapes is not None:
            _check_layout_count(name or "the model", rule, shapes)
        for key, side, layout, shape in tensors_of(rule, shapes) if shapes else ():
            count = None if shape is None else len(shape)
            if isinstance(layout, Shard) and (count is None or not -count <= layout.dim < count):
                had = "is not a tensor" if count is None else f"has {count} dims"
                legal = "null" if count is None else f"shard:{-count} to shard:{count - 1}"
                why = f"the {side} of {name or 'the model'} {had}"
                raise ConfigError(f"{rule.config_key}.{key}", f"shard:{layout.dim}", why, legal)
        if rule.output_stays_sharded and shapes is not None and not shapes.is_last:
            why = f"other layers follow {name}, whose output is therefore not what the loss is computed on"
            raise ConfigError(f"{rule.config_key}.dst", rule.rule.dst, why, "replicate, or shard:N")


def tensors_of(
    rule: ResolvedRule, shapes: CallShapes
) -> Iterator[tuple[str, str, Placement | None, torch.Size | None]]:
    """Each tensor that a rule gives a layout: by which key, whether it is an input or an output, the layout, and the whole
    tensor's shape."""
    converted = rule.rule.style if rule.rule.style in ("input", "output") else None
    for key, side, layouts in (
        ("src", converted or "input", rule.src),
        ("dst", converted or "output", rule.dst),
    ):
        for layout, shape in zip(layouts, shapes.inputs if side == "input" else shapes.outputs, strict=False):
            yield key, side, layout, shape


def _check_layer_layouts(rule: ResolvedRule) -> None:
    """A layer has one input and one output; under style sequence both have the same layout."""
    for key, layouts, given in (("src", rule.src, rule.rule.src), ("dst", rule.dst, rule.rule.dst)):
        if len(layouts) != 1 or layouts[0] is None:
            legal = "one layout, such as replicate"
            raise ConfigError(
                f"{rule.config_key}.{key}", given, f"style {rule.label} has one tensor there", legal
            )
    if rule.rule.style == "sequence" and (not isinstance(rule.src[0], Shard) or rule.src != rule.dst):
        why = "style sequence runs a layer on a part of its input, and its output has the same layout"
        legal = "src and dst the same, such as shard:1"
        raise ConfigError(
            rule.config_key, f"{rule.rule.src} -> {rule.rule.dst}", why, legal, fix=_overrides_to_drop(rule)
        )


def _check_layout_count(name: str, rule: ResolvedRule, shapes: CallShapes) -> None:
    """A rule that only converts layouts has one layout per tensor."""
    what = str(rule.rule.style)
    tensors = shapes.inputs if what == "input" else shapes.outputs
    if len(rule.src) != len(tensors):
        why = f"{len(rule.src)} layouts, and {name} has {len(tensors)} {what}s"
        legal = f"src and dst lists of {len(tensors)}, null for a tensor left alone"
        raise ConfigError(f"{rule.config_key}.src", rule.rule.src, why, legal, _overrides_to_drop(rule))


def _overrides_to_drop(rule: ResolvedRule) -> dict[str, object]:
    return {f"{rule.config_key}.{key}": None for key in ("src", "dst", "style")}
