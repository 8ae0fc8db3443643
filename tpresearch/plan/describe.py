"""A compiled plan as a table: each parameter's placement and local shape, and what each module sends. And the mesh and the
sharded model, for a run's log.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tpresearch.config.axes import AXES, AXIS_NAMES, SHARD, MeshSizes
from tpresearch.plan.collectives import rule_collectives
from tpresearch.plan.compiler import Plan, fsdp_local_shape, sharded_dim
from tpresearch.plan.rules import ResolvedRule
from tpresearch.plan.sequence import LAYER_NUMBER


class PlanRow(NamedTuple):
    """A line of the table: a parameter, or a module whose rule only moves activations."""

    fqn: str
    rule: str = ""
    placement: str = ""
    local_shape: str = ""
    """On rank 0, which holds the larger part if a dim does not divide evenly."""
    collectives: str = ""


def plan_rows(model: nn.Module, plan: Plan) -> list[PlanRow]:
    """One row per parameter and one per module that only moves activations, in the model's order."""
    rows = []
    for name, module in model.named_modules():
        rule = plan.rules.get(name)
        own = dict(module.named_parameters(recurse=False))
        named, sends = (
            (f"{rule.name} ({rule.label})", _format_collectives(name, model, plan)) if rule else ("", "")
        )
        if rule and not own:
            rows.append(PlanRow(name or ".", named, _format_conversions(rule), "", sends))
        for index, (key, parameter) in enumerate(own.items()):
            fqn = f"{name}.{key}" if name else key
            dim, placements = sharded_dim(fqn, model, plan.rules), []
            if plan.sizes.shards > 1 and parameter.dim():
                placements.append(f"{SHARD.name}: Shard(0)")
            if rule and dim is not None:
                placements.append(f"{rule.axis}: Shard({dim})")
            elif rule and rule.rule.target:
                placements.append(f"{rule.axis}: by {rule.label}")
            placement = ", ".join(placements) or "replicated"
            shape = _format_shape(fsdp_local_shape(fqn, model, plan)) or "1"
            if rule and rule.rule.target:
                shape = "?"
            rows.append(PlanRow(fqn, named, placement, shape, sends if index == 0 else ""))
    return rows


def _format_conversions(rule: ResolvedRule) -> str:
    moves = zip(rule.src, rule.dst, strict=False)
    return ", ".join(
        f"{_format_layout(src)} -> {_format_layout(dst)}" for src, dst in moves if src is not None
    )


def _format_layout(layout: Placement | None) -> str:
    if layout is None:
        return "unchanged"
    return f"shard:{layout.dim}" if isinstance(layout, Shard) else "replicate"


def _format_collectives(name: str, model: nn.Module, plan: Plan) -> str:
    """The collectives that a rule causes over its axis, forward and backward."""
    sent = rule_collectives(name, model, plan)
    parts = []
    for phase in ("forward", "backward"):
        names = [
            f"{s.collective.replace('_', '-')}{'' if s.per_token else ' of a gradient'}"
            for s in sent
            if s.phase == phase
        ]
        if names:
            parts.append(f"{phase}: {' + '.join(names)}")
    return "; ".join(parts)


def fold_layers(rows: Iterable[PlanRow]) -> list[PlanRow]:
    """Rows that differ only in a layer's number, folded into one that names the range."""
    groups: dict[PlanRow, list[PlanRow]] = {}
    for row in rows:
        groups.setdefault(row._replace(fqn=LAYER_NUMBER.sub("*", row.fqn, count=1)), []).append(row)
    return [alike[0] if len(alike) == 1 else _fold(pattern, alike) for pattern, alike in groups.items()]


def _fold(pattern: PlanRow, rows: Sequence[PlanRow]) -> PlanRow:
    """One row for all of them, with `{0-31}` instead of the layer's number."""
    layers = [int(number[0]) for row in rows if (number := LAYER_NUMBER.search(row.fqn))]
    return pattern._replace(fqn=pattern.fqn.replace("*", f"{{{min(layers)}-{max(layers)}}}", 1))


def plan_table(model: nn.Module, plan: Plan) -> list[PlanRow]:
    """The table's header, then its rows."""
    axes = " ".join(_tensor_axes(plan))
    over = f"collectives over {axes}" if axes else "collectives"
    return [PlanRow("FQN", "rule", "placement", "local shape", over), *fold_layers(plan_rows(model, plan))]


def _format_shape(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def plan_notes(model: nn.Module, plan: Plan) -> list[str]:
    """Notes below the table: the parameter count, what stays replicated, and what the data axes send."""
    notes = [f"parameters: {sum(p.numel() for p in model.parameters()):,}"]
    if plan.rules:
        count = sum(model.get_parameter(name).numel() for name in plan.replicated)
        listed = _join_names(plan.replicated) or "none"
        notes.append(f"replicated on every {' '.join(_tensor_axes(plan))} rank: {count:,} ({listed})")
        where = {-1: "vocabulary shards", 0: "each rank's rows", None: "whole outputs"}[plan.output_shard_dim]
        notes.append(f"loss: on {where}")
    if plan.float8:
        notes.append(
            f"matmuls in float8: {_join_names(plan.float8)}{'; tp ranks agree on scales' if plan.rules else ''}"
        )
    notes += _data_axis_notes(model, plan)
    if plan.across_rows:
        notes.append(
            f"rows of a batch: {plan.across_rows} works across them, on each data-parallel rank and in each micro-batch across its own: "
            "equality with one process is not claimed"
        )
    buffers = dict(model.named_buffers())
    if changed := [name for name in plan.probe.changed_state if name in buffers]:
        notes.append(
            f"buffers: a forward changes {_join_names(changed)}, on each data-parallel rank and in each micro-batch by its own rows: "
            "equality with one process is not claimed, and a checkpoint has one rank's"
        )
        if passing := sorted(set(changed) - set(model.state_dict())):
            notes.append(
                f"not in checkpoints: {_join_names(passing)}, which a forward changes and persistent=False leaves out: a resumed run starts them anew"
            )
    if numbers := [name for name in plan.probe.changed_state if name not in buffers]:
        notes.append(
            f"not in checkpoints: {_join_names(numbers)}, which a forward changes, once for each micro-batch, and which is no buffer: a resumed run starts it anew"
        )
    if plan.probe.draws:
        notes.append(
            f"random numbers: {_join_names(plan.probe.draws)} draw by (seed, step, micro-batch, data-parallel rank); the same run repeats "
            "bitwise and replicas agree, but plans differ in what they draw: equality with one process is not claimed"
        )
    return notes


def plan_text(model: nn.Module, plan: Plan) -> str:
    """The whole table as text, with the notes below it."""
    table = plan_table(model, plan)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    header, *rows = (
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in table
    )
    rule = "-" * max(map(len, [header, *rows]))
    return "\n".join([header, rule, *rows, "", *plan_notes(model, plan)]) + "\n"


def plan_html(model: nn.Module, plan: Plan) -> str:
    """The table and the notes as HTML, for a notebook."""
    tags = itertools.chain(["th"], itertools.repeat("td"))
    lines = (
        "".join(f"<{tag} style='text-align: left'>{escape(cell)}</{tag}>" for cell in line)
        for tag, line in zip(tags, plan_table(model, plan), strict=False)
    )
    body = "".join(f"<tr>{line}</tr>\n" for line in lines)
    notes = "".join(f"<li>{escape(note)}</li>\n" for note in plan_notes(model, plan))
    return f"<table>\n{body}</table>\n<ul>\n{notes}</ul>\n"


def _join_names(names: Iterable[str]) -> str:
    return ", ".join(row.fqn for row in fold_layers(PlanRow(name or ".") for name in names))


def _tensor_axes(plan: Plan) -> list[str]:
    return [axis.name for axis in AXES if axis.shards_layers and plan.sizes[axis.name] > 1]


def _data_axis_notes(model: nn.Module, plan: Plan) -> list[str]:
    lines, units = [], "the whole model as one unit"
    if plan.blocks:
        after = f", the last with {_join_names(plan.after_blocks)}" if plan.after_blocks else ""
        has_rest = any(plan.unit_of(name) is None for name, _ in model.named_parameters())
        each = [f"{len(plan.blocks)} blocks{after}", *plan.end_layers, *["the rest of the model"] * has_rest]
        units = f"per unit ({'; '.join(each)})"
    for axis in reversed([axis for axis in AXES if axis.splits_rows and plan.sizes[axis.name] > 1]):
        what = "gradients all-reduced, once per step"
        if axis.shards_state:
            what = (
                "weights all-gathered in forward (a block's again in backward if "
                "parallel.fsdp.reshard_after_forward has freed them), gradients reduce-scattered"
            )
        lines.append(f"over {axis.name}={plan.sizes[axis.name]}, {units}: {what}")
    return lines


def describe_mesh(sizes: MeshSizes, device: str) -> str:
    """The mesh of the axes that have more than one rank, as torch prints one with its ranks written out."""
    shown = sizes.nontrivial() or {AXIS_NAMES[-1]: 1}
    ranks = torch.arange(sizes.world).view(*shown.values()).tolist()
    return f"DeviceMesh('{device}', {ranks}, mesh_dim_names={tuple(shown)})"


def describe_model(model: nn.Module) -> str:
    """Each parameter of the sharded model: its placements, and its local and global shape.

    Llama2
      layers.{0-1}.attention.wq.weight  dp_shard: Shard(0), tp: Shard(0)  64x256 of 256x256
    """
    rows = []
    for name, parameter in model.named_parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        here, whole = (_format_shape(tensor.shape) or "scalar" for tensor in (local, parameter))
        shape = here if here == whole else f"{here} of {whole}"
        rows.append(PlanRow(name, placement=_placements(parameter), local_shape=shape))
    rows = fold_layers(rows)
    names, places = (max(len(row[column]) for row in rows) for column in (0, 2))
    lines = [f"  {row.fqn:<{names}}  {row.placement:<{places}}  {row.local_shape}" for row in rows]
    return "\n".join([type(model).__name__.removeprefix("FSDP"), *lines])


def _placements(parameter: torch.Tensor) -> str:
    """A parameter's placements over the axes with several ranks, where it is sharded."""
    if not isinstance(parameter, DTensor):
        return "replicated"
    mesh = parameter.device_mesh
    over = zip(mesh.mesh_dim_names or (), mesh.shape, parameter.placements, strict=True)
    found = [
        f"{name}: Shard({getattr(placement, 'dim', '?')})"
        for name, size, placement in over
        if size > 1 and not isinstance(placement, Replicate)
    ]
    return ", ".join(found) or "replicated"
