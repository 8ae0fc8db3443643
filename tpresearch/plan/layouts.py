"""The layouts of a plan's rules held to the tensors that a batch's shapes have shown: how many there are, and their dims."""

from __future__ import annotations

from torch.distributed.tensor import Shard

from tpresearch.config.errors import ConfigError
from tpresearch.plan.probe import Dims, Ndims, Probe
from tpresearch.plan.rules import Layouts, ResolvedRule


def check_layouts(rules: dict[str, ResolvedRule], seen: Probe) -> None:
    """Refuse layouts that torch would only find wrong in the first step.

    Args:
        rules: by module name. seen: no dims are judged of a module that the probe has not called.

    Raises:
        ConfigError: naming the rule's key.
    """
    for name, rule in rules.items():
        if rule.rule.target:
            continue
        dims = seen.dims.get(name)
        if rule.rule.style in ("input", "output"):
            if dims is not None:
                _check_moved(name or "the model", rule, dims)
        else:
            _check_single(rule)
            if dims is not None:
                _check_dims(f"{rule.where}.src", f"input of {name}", rule.src, dims.inputs)
                _check_dims(f"{rule.where}.dst", f"output of {name}", rule.dst, dims.outputs)
        if rule.leaves_split and dims is not None and not dims.is_last:
            why = f"other layers follow {name}, whose output is therefore not what the loss is computed on"
            raise ConfigError(f"{rule.where}.dst", rule.rule.dst, why, "replicate, or shard:N")


def _check_single(rule: ResolvedRule) -> None:
    """A layer has one input and one output; on its part of a sequence it leaves them as they are."""
    for key, layouts, given in (("src", rule.src, rule.rule.src), ("dst", rule.dst, rule.rule.dst)):
        if len(layouts) != 1 or layouts[0] is None:
            legal = "one layout, such as replicate"
            raise ConfigError(f"{rule.where}.{key}", given, f"style {rule.label} has one tensor there", legal)
    if rule.rule.style == "sequence" and (not isinstance(rule.src[0], Shard) or rule.src != rule.dst):
        why = "style sequence runs a layer on a part of its input, and leaves the output so"
        legal = "src and dst the same, such as shard:1"
        raise ConfigError(rule.where, f"{rule.rule.src} -> {rule.rule.dst}", why, legal, fix=_without(rule))


def _check_moved(name: str, rule: ResolvedRule, dims: Dims) -> None:
    """Rules that only move tensors have a layout for each."""
    what = str(rule.rule.style)
    tensors = dims.inputs if what == "input" else dims.outputs
    if len(rule.src) != len(tensors):
        why = f"{len(rule.src)} layouts, and {name} has {len(tensors)} {what}s"
        legal = f"src and dst lists of {len(tensors)}, null for a tensor left alone"
        raise ConfigError(f"{rule.where}.src", rule.rule.src, why, legal, _without(rule))
    _check_dims(f"{rule.where}.src", f"{what} of {name}", rule.src, tensors)
    _check_dims(f"{rule.where}.dst", f"{what} of {name}", rule.dst, tensors)


def _check_dims(key: str, what: str, layouts: Layouts, dims: Ndims) -> None:
    for layout, count in zip(layouts, dims, strict=False):
        if isinstance(layout, Shard) and (count is None or not -count <= layout.dim < count):
            had = "is no tensor" if count is None else f"has {count} dims"
            legal = "null" if count is None else f"shard:{-count} to shard:{count - 1}"
            raise ConfigError(key, f"shard:{layout.dim}", f"the {what} {had}", legal)


def _without(rule: ResolvedRule) -> dict[str, object]:
    return {f"{rule.where}.{key}": None for key in ("src", "dst", "style")}
