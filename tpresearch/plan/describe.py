"""A compiled plan as a table: what each parameter becomes on a rank, and what each module sends."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import Placement, Shard

from tpresearch.plan.compiler import Plan, local_shape, split_dim
from tpresearch.plan.effects import rule_sends
from tpresearch.plan.rules import Compiled


@dataclass(frozen=True)
class Row:
    """A line of the table: a parameter, or a module whose rule only moves activations."""

    fqn: str
    rule: str
    placement: str
    local_shape: tuple[int, ...] | None
    """On rank 0, which holds the larger part where a dim does not divide evenly."""
    collectives: str


def plan_rows(model: nn.Module, plan: Plan) -> list[Row]:
    """One row a parameter and one a module that only moves activations, in the model's order."""
    rows = []
    for name, module in model.named_modules():
        rule = plan.rules.get(name)
        own = dict(module.named_parameters(recurse=False))
        sends = _sends(name, model, plan) if rule else ""
        if rule and not own:
            rows.append(Row(name or ".", f"{rule.name} ({rule.label})", _arrow(rule), None, sends))
        for index, (key, parameter) in enumerate(own.items()):
            fqn = f"{name}.{key}" if name else key
            dim = split_dim(fqn, plan.rules, module)
            shape, placements = list(local_shape(fqn, parameter, plan, module)), []
            if dim is not None:
                placements.append(f"tp: Shard({dim})")
            elif rule and rule.rule.target:
                placements.append(f"tp: by {rule.label}")
            if plan.sizes.dp_shard > 1 and shape:
                shape[0] = -(-shape[0] // plan.sizes.dp_shard)
                placements.insert(0, "dp_shard: Shard(0)")
            rows.append(
                Row(
                    fqn,
                    f"{rule.name} ({rule.label})" if rule else "",
                    ", ".join(placements) or "whole",
                    tuple(shape),
                    sends if index == 0 else "",
                )
            )
    return rows


def _arrow(rule: Compiled) -> str:
    return ", ".join(
        f"{_short(a)} -> {_short(b)}" for a, b in zip(rule.src, rule.dst, strict=False) if a is not None
    )


def _short(layout: Placement | None) -> str:
    if layout is None:
        return "as it is"
    return f"shard:{layout.dim}" if isinstance(layout, Shard) else "whole"


def _sends(name: str, model: nn.Module, plan: Plan) -> str:
    """The collectives over tp that a rule causes, a forward and a backward part."""
    sent = rule_sends(name, model, plan)
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


def folded(rows: Iterable[Row]) -> list[Row]:
    """Rows that differ only in a layer's number, as one row that names the range."""
    groups: dict[tuple, list[tuple[int, Row]]] = {}
    for row in rows:
        numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", row.fqn)
        pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", row.fqn, count=1)
        key = (pattern, row.rule, row.placement, row.local_shape, row.collectives)
        groups.setdefault(key, []).append((int(numbers[0]) if numbers else -1, row))
    out = []
    for (pattern, *_), members in groups.items():
        numbers = [number for number, _ in members]
        row = members[0][1]
        fqn = row.fqn if len(members) == 1 else pattern.replace("*", f"{{{min(numbers)}-{max(numbers)}}}", 1)
        out.append(Row(fqn, row.rule, row.placement, row.local_shape, row.collectives))
    return out


def plan_text(model: nn.Module, plan: Plan) -> str:
    """The whole table as text, with the parameter count, what stays whole, and what the data axes send."""
    rows = folded(plan_rows(model, plan))
    header = ("FQN", "rule", "placement", "local shape", "collectives over tp")
    cells = [
        (
            r.fqn,
            r.rule,
            r.placement,
            "" if r.local_shape is None else "x".join(map(str, r.local_shape)) or "1",
            r.collectives,
        )
        for r in rows
    ]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [header, *cells]
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    total = sum(p.numel() for p in model.parameters())
    lines += ["", f"parameters: {total:,}"]
    if plan.sizes.tp > 1:
        whole = folded(Row(name, "", "", None, "") for name in plan.whole)
        count = sum(dict(model.named_parameters())[name].numel() for name in plan.whole)
        lines.append(
            f"left whole on every tp rank: {count:,} ({', '.join(row.fqn for row in whole) or 'none'})"
        )
        where = {-1: "vocabulary shards", 0: "each rank's rows", None: "whole outputs"}[plan.split_output]
        lines.append(f"loss: on {where}")
    lines += _data_lines(plan)
    return "\n".join(lines) + "\n"


def _data_lines(plan: Plan) -> list[str]:
    sizes, lines = plan.sizes, []
    count = len(plan.blocks)
    blocks = (
        f"each of {count} blocks, then the rest of the model as one" if count else "the whole model as one"
    )
    if sizes.dp_shard > 1:
        lines.append(
            f"over dp_shard={sizes.dp_shard}: {blocks}: weights all-gathered in forward (a block's again in backward, "
            "where parallel.fsdp.reshard_after_forward frees them), gradients reduce-scattered"
        )
    if sizes.dp_replicate > 1:
        lines.append(f"over dp_replicate={sizes.dp_replicate}: {blocks}: gradients all-reduced, once a step")
    return lines
