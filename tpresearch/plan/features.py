"""What a model does with the features of a layer's output: ops that need all of them compute something else on a rank's shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

DIM_ARGUMENT = {
    **dict.fromkeys(("select", "unbind", "slice", "_softmax", "_log_softmax", "cumsum", "glu", "mean"), 1),
    **dict.fromkeys(("sum", "amax", "amin", "var", "std", "logsumexp", "max", "min", "argmax", "sort"), 1),
    **dict.fromkeys(("split", "split_with_sizes", "topk", "linalg_vector_norm"), 2),
}
"""By the name of an op that needs all features where it works along the last dim: the place of its dim among its arguments."""

DEFAULT_DIMS = {"unbind": 0, "slice": 0, "split": 0, "split_with_sizes": 0}
"""Where one is left out, it is the last (as of topk) or all; but for these."""

VIEWS = ("view", "_unsafe_view")

SAME_FEATURES = ("clone", "detach", "_to_copy", "alias", *VIEWS, "native_dropout")
"""Ops whose output has its input's features in their places, if it has its shape; so has that of every pointwise op."""


class FeatureUse:
    """Follows outputs of layers through pointwise ops, and notes which of them an op needs whole rows of."""

    def __init__(self) -> None:
        self._made_by = WeakTensorKeyDictionary()
        self.across: dict[str, str] = {}
        """Name of a layer -> the op that needs all features of its output."""
        self.widths: dict[str, int] = {}
        """Name of a layer -> size of the last dim into which a view first splits the features of its output, such as a head's."""

    def made(self, layer: str, output: object) -> None:
        """A layer has returned this."""
        if isinstance(output, Tensor):
            self._made_by[output] = layer

    def note(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: object) -> None:
        """An op was called."""
        made = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t in self._made_by]
        if not made:
            return
        layer, name = self._made_by[made[0]], op.overloadpacket.__name__
        if args and args[0] is made[0] and _needs_all_features(name, made[0], args, kwargs):
            self.across.setdefault(layer, name.strip("_"))
        if name in VIEWS and isinstance(outputs, Tensor) and outputs.shape[-1:] < made[0].shape[-1:]:
            self.widths.setdefault(layer, outputs.shape[-1])
        if torch.Tag.pointwise in op.tags or name in SAME_FEATURES:
            for output in tree_leaves(outputs):
                if isinstance(output, Tensor) and output.shape == made[0].shape:
                    self._made_by[output] = layer


def _needs_all_features(name: str, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "native_layer_norm":
        return True
    if name not in DIM_ARGUMENT:
        return False
    place = DIM_ARGUMENT[name]
    default = DEFAULT_DIMS.get(name, -1)
    found = args[place] if len(args) > place else kwargs.get("dim", default)
    dims = [default] if found is None else found if isinstance(found, list | tuple) else [found]
    if not any(isinstance(dim, int) and dim in (-1, x.dim() - 1) for dim in dims or [-1]):
        return False
    if name == "slice":
        start, end = (*args[2:4], None, None)[:2]
        return bool(start) or (end is not None and end < x.shape[-1]) or len(args) > 4
    return not (name == "split" and args[1] >= x.shape[-1])
