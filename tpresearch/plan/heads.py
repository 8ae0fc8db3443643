"""Heads of a width that a rank's shard changes: `view(b, s, n_heads, -1)` fits a shard too, and makes narrower heads of it."""

from __future__ import annotations

import copy
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode

from tpresearch.config.errors import WrongModel
from tpresearch.plan.compiler import Plan
from tpresearch.plan.features import DimUse


class _Enough(Exception):
    """One layer of each rule was compared."""


class _Shards(TorchDispatchMode):
    """Runs a meta model as if it had a rank's shards: outputs of column-wise layers are cut to a shard, and inputs of row-wise layers
    made whole again. Compares what views make of the outputs with what they made of whole ones."""

    def __init__(self, model: nn.Module, plan: Plan, whole: dict[str, int]) -> None:
        super().__init__()
        self._whole, self._features = whole, DimUse(-1)
        self._rule_of = {name: plan.rules[name].name for name in whole if name in plan.rules}
        self._left: set[str] = set()
        self.different: tuple[str, int] | None = None
        """A layer, and the width of its heads on a shard."""
        for name, rule in plan.rules.items():
            layer, ranks = model.get_submodule(name), plan.sizes[rule.axis]
            if not isinstance(layer, nn.Linear):
                continue
            if rule.rule.style == "colwise" and rule.dst[0] == Shard(-1) and not rule.output_stays_sharded:
                layer.register_forward_hook(partial(self._cut, name, layer.out_features // ranks))
                self._left |= {self._rule_of[name]} if name in whole else set()
            elif rule.rule.style == "rowwise" and rule.src[0] == Shard(-1):
                layer.register_forward_pre_hook(_made_whole)

    def _cut(self, name: str, size: int, layer: nn.Module, args: Any, output: Tensor) -> Tensor:
        shard = output.new_empty(*output.shape[:-1], size)
        self._features.made(name, shard)
        return shard

    def run(self, model: nn.Module, inputs: Tensor) -> None:
        if self._left:
            with suppress(Exception), torch.device("meta"), self:  # sizes that do not fit end the first step
                model(inputs)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self._features.note("", func, args, kwargs or {}, output)
        for name, width in self._features.widths.items():
            if width != self._whole.get(name, width):
                self.different = name, width
                raise _Enough
            self._left.discard(self._rule_of.get(name, ""))
        if not self._left:
            raise _Enough
        return output


def _made_whole(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    assert isinstance(layer, nn.Linear)
    return (args[0].new_empty(*args[0].shape[:-1], layer.in_features), *args[1:])


def check_heads(model: nn.Module, plan: Plan, inputs: Tensor, name: str) -> None:
    """Refuse a forward that makes as many heads of a rank's features as of all.

    Args:
        model: on the meta device, whole. inputs: a micro-batch, on the meta device. name: the model's.
    """
    if any(rule.rule.target for rule in plan.rules.values()):
        return
    model = copy.deepcopy(model)
    shards = _Shards(model, plan, plan.probe.widths)
    shards.run(model, inputs)
    if shards.different:
        layer, width = shards.different
        ranks = plan.sizes[plan.rules[layer].axis]
        why = (
            f"it splits the output of {layer} into heads of {plan.probe.widths[layer]} features, and one of {ranks} ranks' shards "
            f"into heads of {width}"
        )
        legal = "a number of heads that follows from the tensor, as in view(b, s, -1, head_dim)"
        raise WrongModel(name, why, legal)
