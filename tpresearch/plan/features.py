"""What a model does with the features and the positions of a layer's output: ops that need all of them compute something else on a
rank's shard."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

DIM_ARGUMENT = {
    **dict.fromkeys(("select", "unbind", "slice", "_softmax", "_log_softmax", "cumsum", "glu", "mean"), 1),
    **dict.fromkeys(("sum", "amax", "amin", "var", "std", "logsumexp", "max", "min", "argmax", "sort"), 1),
    **dict.fromkeys(("split", "split_with_sizes", "topk", "linalg_vector_norm", "roll"), 2),
}
"""By the name of an op that needs all of a dim where it works along it: the place of its dim among its arguments."""

DEFAULT_DIMS = {"unbind": 0, "slice": 0, "split": 0, "split_with_sizes": 0}
"""Where one is left out, it is the last (as of topk) or all; but for these."""

VIEWS = ("view", "_unsafe_view")

SAME_PLACES = ("clone", "detach", "_to_copy", "alias", *VIEWS, "native_dropout")
"""Ops whose output has its input's elements in their places, if it has its shape; so has that of every pointwise op."""

Across = dict[str, dict[str, str]]
"""Module -> by the module that calls it, an op that needs all of a dim of the first one's output."""


class DimUse:
    """Follows a dim of modules' outputs through pointwise ops and transposes, and notes which ops need all of it.

    Args:
        dim: of the outputs; -1 for features.
    """

    def __init__(self, dim: int) -> None:
        self._dim = dim
        self._made_by = WeakTensorKeyDictionary()
        """Of a tensor that is followed: the module that has returned it, and the place of the dim in it."""
        self.across: Across = {}
        self.widths: dict[str, int] = {}
        """Name of a module -> size of the last dim into which a view first splits the features of its output, such as a head's."""

    def made(self, module: str, output: object) -> None:
        """A module has returned this."""
        if isinstance(output, Tensor) and output.dim() > max(self._dim, 0):
            self._made_by[output] = module, self._dim % output.dim()

    def note(
        self, running: str, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: object
    ) -> None:
        """An op was called, by the module that is running."""
        x = next(
            (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t in self._made_by), None
        )
        if x is None:
            return
        (module, dim), name = self._made_by[x], op.overloadpacket.__name__
        if args and args[0] is x and needs_all(name, x, dim, args, kwargs):
            self.across.setdefault(module, {}).setdefault(running, name.strip("_"))
        for output in tree_leaves(outputs):
            if not isinstance(output, Tensor):
                continue
            if name in VIEWS and dim == x.dim() - 1 and _makes_heads(x.shape, output.shape):
                self.widths.setdefault(module, output.shape[-1])
            if name in ("transpose", "permute"):
                order = [*range(x.dim())]
                if name == "permute":
                    order = [each % x.dim() for each in args[1]]
                else:
                    order[args[1]], order[args[2]] = order[args[2]], order[args[1]]
                self._made_by[output] = module, order.index(dim)
            elif output.shape == x.shape and (torch.Tag.pointwise in op.tags or name in SAME_PLACES):
                self._made_by[output] = module, dim


def needs_all(name: str, x: Tensor, dim: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the op of this name, called on `x`, works along its dim `dim`, from 0."""
    if name == "native_layer_norm":
        return dim >= x.dim() - len(args[1])
    if name == "convolution":
        return dim >= 2 and args[1].shape[dim] > 1
    if name == "constant_pad_nd":  # as for a causal convolution; its sizes are in pairs, from the last dim on
        last = 2 * (x.dim() - 1 - dim)
        return any(args[1][last : last + 2])
    if name not in DIM_ARGUMENT:
        return False
    place = DIM_ARGUMENT[name]
    default = DEFAULT_DIMS.get(name, -1)
    found = args[place] if len(args) > place else kwargs.get("dim", default)
    dims = [default] if found is None else found if isinstance(found, list | tuple) else [found]
    if not any(isinstance(each, int) and each % x.dim() == dim for each in dims or [dim]):
        return False
    if name == "slice":
        start, end = (*args[2:4], None, None)[:2]
        return bool(start) or (end is not None and end < x.shape[dim]) or len(args) > 4
    return not (name == "split" and args[1] >= x.shape[dim])


def _makes_heads(of: torch.Size, made: torch.Size) -> bool:
    """Whether a view of this shape splits features into heads; a single one has them all."""
    return made[-1:] < of[-1:] or made == (*of[:-1], 1, of[-1])
