"""What each sharding rule sends over its axis: exactly the collectives that its layout changes require."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.distributed.tensor import Placement, Shard

from tpresearch.plan.compiler import Plan
from tpresearch.plan.rules import Layouts

# What converting one layout to another sends, forward and backward (the gradient is converted back). On the
# way into a module the gradient arrives as a partial sum, since each rank holds a part of the weight; on the
# way out it arrives in the layout that the output was given.
_INPUT_COLLECTIVES = {
    ("shard", "replicate"): ("all_gather", "reduce_scatter"),
    ("replicate", "replicate"): ("", "all_reduce"),
    ("replicate", "shard"): ("", "all_gather"),
}
_OUTPUT_COLLECTIVES = {
    ("partial", "replicate"): ("all_reduce", ""),
    ("partial", "shard"): ("reduce_scatter", "all_gather"),
    ("shard", "replicate"): ("all_gather", ""),
    ("replicate", "shard"): ("", "all_gather"),
}


@dataclass(frozen=True)
class RuleCollective:
    """One collective of a micro-batch, over the rule's axis."""

    phase: str
    """forward or backward."""
    collective: str
    width: int
    """Elements of the full tensor: per token if `per_token`, else in total."""
    per_token: bool = True


def rule_collectives(name: str, model: nn.Module, plan: Plan) -> list[RuleCollective]:
    """The collectives of the rule on module `name`; none are known for a rule with a custom ParallelStyle.

    The width is 0 where the rule does not determine it: style output, style input around no colwise rule, and colwise where a rule of style
    input leaves a shard.
    """
    rule, module = plan.rules[name], model.get_submodule(name)
    src, dst = ([_layout_name(layout) for layout in side] for side in (rule.src, rule.dst))
    into: list[RuleCollective] = []
    out: list[RuleCollective] = []
    match rule.rule.style:
        case "input":
            moves = list(zip(src, dst, strict=True))
            into = _conversions(_INPUT_COLLECTIVES, moves, _input_width(name, model, plan))
        case "output":
            out = _conversions(_OUTPUT_COLLECTIVES, list(zip(src, dst, strict=True)), 0)
        case "sequence":
            own = module.parameters(recurse=False)
            out = [RuleCollective("backward", "all_reduce", p.numel(), per_token=False) for p in own]
        case "colwise":
            width_in, width_out = _feature_widths(module)
            outside = _prepared_outside(name, plan)
            if outside is None:
                into = _conversions(_INPUT_COLLECTIVES, [(src[0], "replicate")], width_in)
            elif any(isinstance(layout, Shard) for layout in outside):  # sent here after all
                into = _conversions(_INPUT_COLLECTIVES, [("shard", "replicate")], 0)
            # A gather of uneven parts moves each filled up to the largest.
            ranks = plan.sizes[rule.axis]
            out = _conversions(_OUTPUT_COLLECTIVES, [("shard", dst[0])], -(-width_out // ranks) * ranks)
        case "rowwise":
            width_in, width_out = _feature_widths(module)
            if not isinstance(module, nn.Embedding):  # whose input is indices
                into = _conversions(_INPUT_COLLECTIVES, [(src[0], "shard")], width_in)
            # A bias is added before the sum, so that its gradient, like the output's, is whole on every rank.
            out = _conversions(_OUTPUT_COLLECTIVES, [("partial", dst[0])], width_out)
    if name in plan.probe.no_input_grad:
        into = [sent for sent in into if sent.phase == "forward"]
    return into + out


def _conversions(
    table: dict[tuple[str, str], tuple[str, str]], moves: list[tuple[str, str]], width: int
) -> list[RuleCollective]:
    pairs = [zip(("forward", "backward"), table.get(move, ("", "")), strict=True) for move in moves]
    return [
        RuleCollective(phase, collective, width) for pair in pairs for phase, collective in pair if collective
    ]


def _feature_widths(module: nn.Module) -> tuple[int, int]:
    """Features per token of the input and the output."""
    if isinstance(module, nn.Embedding):
        return 1, module.embedding_dim
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _input_width(name: str, model: nn.Module, plan: Plan) -> int:
    """The width of a module's input, from the first colwise layer inside it."""
    under = f"{name}." if name else ""
    inner = (n for n, rule in plan.rules.items() if n.startswith(under) and rule.rule.style == "colwise")
    first = next(inner, None)
    return _feature_widths(model.get_submodule(first))[0] if first else 0


def _prepared_outside(name: str, plan: Plan) -> Layouts | None:
    """The layouts to which the innermost rule on an enclosing module has already converted the input; None if there is no such rule.

    Except a rule on the model itself, which refers to the model's input: a layer's input is as its `src` says.
    """
    outer = [
        rule for at, rule in plan.rules.items() if name.startswith(at + ".") and rule.rule.style == "input"
    ]
    return outer[-1].dst if outer else None


def _layout_name(layout: Placement | None) -> str:
    if layout is None:
        return "unchanged"
    return "shard" if isinstance(layout, Shard) else "replicate"
