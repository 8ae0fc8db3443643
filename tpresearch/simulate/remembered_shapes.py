"""A fake tensor mode that remembers what ops make of the shapes they are given.

A step runs thousands of ops on the same shapes, in every block and micro-batch. torch remembers their outputs too
(`FakeTensorMode.cache`), but looking them up, with symbolic sizes, constants and sparse tensors in mind, was half of a
recording's time. Here the plain cases are looked up, and views are made by their own kernel; all else is left to torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._pytree import tree_leaves

_SHAPES_OF_VALUES = {torch.Tag.inplace_view, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_VALUES = {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format}
_MOST_REMEMBERED = 100_000


class _Output(NamedTuple):
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class _Remembered(NamedTuple):
    outputs: tuple[_Output | None, ...]
    container: type | None
    """tuple or list; None for a single output."""


class _Kind(Enum):
    new = "outputs are new tensors"
    view = "outputs are views of the first argument"
    in_place = "the first argument alone is written to and returned"
    other = "left to torch"


_remembered: dict[tuple[Any, ...], _Remembered] = {}


class RememberingFakeTensorMode(FakeTensorMode):
    """Gives what `FakeTensorMode` gives, in less time (private; run on torch 2.11 and 2.13, read in 2.14)."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kind, kwargs = _kind(func), kwargs or {}
        if not (kind is _Kind.other or self.in_kernel_invocation or torch.is_inference_mode_enabled()):
            if kind is _Kind.view and self._is_plain(args[0]):
                return self._view(func, args, kwargs)
            key: list[Any] = [func, torch.get_default_dtype()]
            if kind is not _Kind.view and self._describe(args, key) and self._describe(kwargs.items(), key):
                return self._look_up(kind, tuple(key), func, types, args, kwargs)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _view(self, func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        with in_kernel_invocation_manager(self):
            views = func(*args, **kwargs)
        device = args[0].fake_device
        if isinstance(views, Tensor):
            return FakeTensor(self, views, device)
        return type(views)(FakeTensor(self, view, device) for view in views)

    def _look_up(
        self,
        kind: _Kind,
        key: tuple[Any, ...],
        func: OpOverload,
        types: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        known = _remembered.get(key)
        if known is None:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            if known := _remember(kind, result, (args, kwargs)):
                if len(_remembered) >= _MOST_REMEMBERED:
                    _remembered.clear()
                _remembered[key] = known
            return result
        if kind is _Kind.in_place:
            return args[0]
        made = [None if output is None else self._make(output) for output in known.outputs]
        return known.container(made) if known.container else made[0]

    def _is_plain(self, value: Any) -> bool:
        return type(value) is FakeTensor and value.constant is None and value.fake_mode is self

    def _describe(self, values: Any, key: list[Any]) -> bool:
        """Append to the key all that shapes, strides and dtypes of outputs can depend on; False if there may be more."""
        for value in values:
            kind = type(value)
            if self._is_plain(value):
                key += value.shape, value.stride(), value.dtype, value.fake_device
            elif kind in _VALUES:
                key += kind, value
            elif kind in (list, tuple, torch.Size):
                key += kind, len(value)
                if not self._describe(value, key):
                    return False
            else:
                return False
        return True

    def _make(self, output: _Output) -> FakeTensor:
        made = torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta")
        return FakeTensor(self, made, output.device)


@cache
def _kind(func: Any) -> _Kind:
    if not isinstance(func, OpOverload) or func.namespace != "aten":
        return _Kind.other
    if func is torch.ops.aten._unsafe_view.default:
        return _Kind.view  # though it does not say so
    is_composite = func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    if is_composite or _SHAPES_OF_VALUES & {*func.tags}:
        return _Kind.other
    arguments, returns = func._schema.arguments, func._schema.returns
    aliased = [argument for argument in arguments if argument.alias_info]
    if not aliased:
        return _Kind.new
    is_first = len(aliased) == 1 and aliased[0].name == arguments[0].name and len(returns) == 1
    if not is_first or isinstance(arguments[0].type, torch.ListType):
        return _Kind.other
    return _Kind.in_place if aliased[0].is_write else _Kind.view


def _remember(kind: _Kind, result: Any, given: Any) -> _Remembered | None:
    """What to remember; None for outputs that are more than a dense tensor of its own storage each."""
    if kind is _Kind.in_place:
        return _Remembered((), None)
    container = next((kind for kind in (list, tuple) if isinstance(result, kind)), None)
    storages = {t.untyped_storage() for t in tree_leaves(given) if isinstance(t, Tensor)}
    outputs: list[_Output | None] = []
    for made in result if container else (result,):
        if made is None:
            outputs.append(None)
            continue
        if type(made) is not FakeTensor or made.constant is not None or made.layout is not torch.strided:
            return None
        like = torch.empty_strided(made.shape, made.stride(), dtype=made.dtype, device="meta")
        storage = made.untyped_storage()
        if made.is_conj() or made.is_neg() or made.storage_offset() or made.requires_grad:
            return None
        if storage in storages or storage.nbytes() != like.untyped_storage().nbytes():
            return None
        storages.add(storage)
        outputs.append(_Output(made.shape, made.stride(), made.dtype, made.fake_device))
    return _Remembered(tuple(outputs), container)
