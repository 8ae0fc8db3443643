"""What a rank holds of a sharded tensor, and what ops do to it, as functions of shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Part:
    """Of a tensor's dim `dim`, whose elements are numbered (outer, rank, inner), each rank holds those with its own number."""

    dim: int
    run: int | None
    """How many elements `inner` counts; a shard as DTensor has it is one with a single `outer`. None: all elements are alike, as of zeros."""
    layer: str
    """The module whose output was sharded."""


COPIES = {"clone", "detach", "alias", "lift_fresh"}
"""Ops that change nothing. A forward may call them for a whole tensor and not for a part, or the other way round."""

RESHAPES = {"view", "unsqueeze", "squeeze"}
TRANSPOSES = {"transpose", "permute", "t"}
SLICES = {"slice", "split", "split_with_sizes"}
UNIFORM = {
    *("zeros", "ones", "full", "empty", "empty_strided", "new_empty_strided"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"),
}
"""Ops whose elements are alike, in whatever number."""

OF_ELEMENTS = {"_to_copy", "native_dropout", "copy", "expand", "repeat", "stack", "cat"}
OF_ELEMENTS |= RESHAPES | TRANSPOSES
"""Ops besides the pointwise ones that work along no dim of their inputs. Here and below, those in place are named without their _."""

OF_ALL_DIMS = {"masked_scatter", "renorm", "put", "take", "as_strided", "fill_diagonal", "channel_shuffle"}
OF_LAST_DIMS = {"tril", "triu"}
DIM_NAMES = {"dim", "dims", "dimension", "axis", "dim1", "dim2"}


def name_of(op: Any) -> str:
    name: str = op.overloadpacket.__name__
    return "view" if name in ("_unsafe_view", "_reshape_alias") else name


def is_pointwise(op: Any) -> bool:
    return torch.Tag.pointwise in op.tags


def reshaped(part: Part, before: Sequence[int], after: Sequence[int], ranks: int) -> Part | None:
    """The part of a tensor of shape `after` that has the same elements in the same order; None if it has no dim in which they are
    those of a rank.

    Args:
        before, after: shapes of whole tensors.
    """
    assert part.run
    distance = part.run * math.prod(before[part.dim + 1 :])  # of a rank's element from the next rank's
    for dim, size in enumerate(after):
        step = math.prod(after[dim + 1 :])
        if distance % step == 0 and step * size % (distance * ranks) == 0:
            return replace(part, dim=dim, run=distance // step)
    return None


def transposed(dim: int, name: str, args: tuple[Any, ...], dims: int) -> int:
    """Where a dim is after `transpose`, `permute` or `t`."""
    order = [*range(dims)]
    if name == "permute":
        order = [each % dims for each in args[1]]
    else:
        a, b = (0, 1) if name == "t" else args[1:3]
        order[a], order[b] = order[b], order[a]
    return order.index(dim)


def pieces(
    run: int, ranks: int, whole: Sequence[int], own: Sequence[int], start: int, own_start: int, step: int
) -> int | None:
    """The run of the pieces that a slice or split takes along the dim that is divided; None if a rank's pieces are not its parts
    of the whole ones.

    Args:
        whole, own: their sizes along that dim, of the whole tensor and of a rank's part.
        start, own_start: of a slice, in the whole tensor and in the part.
        step: of a slice.
    """
    if [*whole] != [ranks * size for size in own]:
        return None
    if step > 1:
        return None if run % step or start >= step or own_start != start else run // step
    is_apart = start == ranks * own_start and not any(n % (ranks * run) for n in (start, *whole))
    return run if is_apart else None


def dims_along(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor) -> set[int]:
    """The dims of `x`, an argument of an op, along which the op works and which its outputs have: elements of these depend on several
    of `x` there.

    Of an op that is not known and takes no dim, none; nor of matmuls and norms, of which a sum or a mean has no such dim.
    """
    name, n = name_of(op).removesuffix("_"), x.dim()
    if is_pointwise(op) or name in OF_ELEMENTS:
        return set()
    if name in OF_ALL_DIMS:
        return {*range(n)}
    if name == "convolution":
        return {1, *(dim for dim in range(2, n) if args[1].shape[dim] > 1)}
    if name.endswith(("_pad_nd", "_pad1d", "_pad2d", "_pad3d")):  # sizes in pairs, from the last dim on
        return {n - 1 - at // 2 for at, size in enumerate(args[1]) if size}
    if name in ("index", "index_put"):
        return {dim for dim, index in enumerate(args[1]) if index is not None}
    given = [
        args[at] if len(args) > at else kwargs.get(argument.name, argument.default_value)
        for at, argument in enumerate(op._schema.arguments)
        if argument.name in DIM_NAMES
    ]
    if given:
        return {dim % n for dim in tree_leaves(given) if dim is not None} or {*range(n)}
    if name in OF_LAST_DIMS or "pool" in name or name.startswith(("upsample", "_scaled_dot", "linalg")):
        return {n - 2, n - 1}
    return set()
