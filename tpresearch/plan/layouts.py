"""The layouts of a plan's rules held to the tensors that a batch's shapes have shown: how many there are, and their dims."""

from __future__ import annotations

from torch.distributed.tensor import Shard

from tpresearch.config.errors import ConfigError
from tpresearch.plan.probe import Ndims, Probe
from tpresearch.plan.rules import Layouts, ResolvedRule


def check_layouts(rules: dict[str, ResolvedRule], seen: Probe) -> None:
    """Refuse layouts that torch would only find wrong in the first step.

    Args:
        rules: by module name. seen: nothing is judged of a module that the probe has not called.

    Raises:
        ConfigError: naming the rule's key.
    """
    for name, rule in rules.items():
        dims = seen.dims.get(name)
        if dims is None or rule.rule.target:
            continue
        if rule.rule.style == "input":
            _check_tensors(f"{rule.where}.src", name, rule, dims.inputs, "inputs")
            for key, layouts in (("src", rule.src), ("dst", rule.dst)):
                _check_dims(f"{rule.where}.{key}", name, layouts, dims.inputs, "input")
        elif rule.rule.style == "output":
            _check_tensors(f"{rule.where}.src", name, rule, dims.outputs, "outputs")
            for key, layouts in (("src", rule.src), ("dst", rule.dst)):
                _check_dims(f"{rule.where}.{key}", name, layouts, dims.outputs, "output")
        else:
            _check_dims(f"{rule.where}.src", name, rule.src, dims.inputs, "input")
            _check_dims(f"{rule.where}.dst", name, rule.dst, dims.outputs, "output")
        if rule.leaves_split and not dims.is_last:
            why = f"{name or 'the model'} is followed by other layers, so its output is not what the loss is computed on"
            raise ConfigError(f"{rule.where}.dst", rule.rule.dst, why, "replicate, or shard:N")


def _check_tensors(key: str, name: str, rule: ResolvedRule, dims: Ndims, what: str) -> None:
    if len(rule.src) != len(dims):
        why = f"{len(rule.src)} layouts, and {name or 'the model'} has {len(dims)} {what}"
        legal = f"src and dst lists of {len(dims)}, null for a tensor left alone"
        raise ConfigError(
            key, rule.rule.src, why, legal, {f"{rule.where}.src": None, f"{rule.where}.dst": None}
        )


def _check_dims(key: str, name: str, layouts: Layouts, dims: Ndims, what: str) -> None:
    for layout, count in zip(layouts, dims, strict=False):
        if isinstance(layout, Shard) and (count is None or not -count <= layout.dim < count):
            had = "is no tensor" if count is None else f"has {count} dims"
            legal = "null" if count is None else f"shard:{-count} to shard:{count - 1}"
            raise ConfigError(key, f"shard:{layout.dim}", f"the {what} of {name or 'the model'} {had}", legal)
