"""What selective checkpointing of a block that is not compiled keeps of its forward, until it is computed again for backward."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy

Refusal = Callable[[str], Exception]
"""The exception for a block that cannot be computed again with what is kept, given what it does."""


def keeping_slow_ops(
    sums_at_once: bool, refusal: Refusal
) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Around a forward, and around computing it again: the first time with what is kept, later without.

    Args:
        sums_at_once: whether a layer with a partial sum has it summed over ranks before anything else takes it.
    """
    kept = _Kept(sums_at_once)
    return _keeping(kept), _Recomputing(kept, refusal)


def save_slow_ops(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is slow to recompute (matmuls, attention) or to send again; recompute the rest."""
    return CheckpointPolicy.MUST_SAVE if _is_slow(op) else CheckpointPolicy.PREFER_RECOMPUTE


def _is_slow(op: Any) -> bool:
    return op.namespace == "_c10d_functional" or op.__name__.split(".")[0] in _SLOW_OPS


_SLOW_OPS = {
    *("mm", "addmm", "bmm"),
    *("_scaled_mm", "max", "amax"),  # of float8, whose maxima would read a whole tensor again
    *(f"_scaled_dot_product_{kind}_attention" for kind in ("flash", "efficient", "cudnn")),
    "_scaled_dot_product_flash_attention_for_cpu",
}


VERSIONED_APART = ("_unsafe_view", "unsafe_split", "unsafe_split_with_sizes")
"""Ops that give views of a tensor, as torch's matmul of more than two dims and its `nn.GRU` do, which it does not know for views: a
change in place of one is none of the tensor's to it."""


def _draws(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether it is attention with dropout, from which the generator goes on to what is drawn after it: it is computed again."""
    given = dict(zip((each.name for each in op._schema.arguments), args, strict=False)) | kwargs
    return bool(given.get("dropout_p"))


class _Kept:
    """Outputs of slow ops by op and shapes, in order.

    Where sums are formed at once, of a row-wise layer it is what the ranks have summed, and not what each gives to the sum,
    which under sequence parallelism is as many times larger as there are ranks.
    """

    def __init__(self, sums_at_once: bool) -> None:
        self.outputs: dict[Hashable, deque[_Output]] = {}
        self._sums_at_once = sums_at_once

    def takes(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        return _is_slow(op) and not self.takes_sum_of(op, args) and not _draws(op, args, kwargs)

    def takes_sum_of(self, op: Any, args: tuple[Any, ...]) -> bool:
        return self._sums_at_once and _is_partial_sum(op, args)


class _Output:
    """Tensors in a structure, aliased without the graph of backward, which holds what is kept."""

    def __init__(self, tensors: Any) -> None:
        self.tensors = tree_map_only(Tensor, _alias, tensors)
        self._watched = _tensors_of(self.tensors)
        self._versions = _versions(self._watched)

    def is_changed(self) -> bool:
        return _versions(self._watched) != self._versions

    def watches(self, whole: Tensor, views: Any) -> bool:
        """Whether these are views of one of the tensors; if so, they are watched for changes too."""
        if _storage(whole) not in map(_storage, self._watched):
            return False
        aliases = [_alias(view) for view in _tensors_of(views)]
        self._watched += aliases
        self._versions += _versions(aliases)
        return True


def _alias(tensor: Tensor) -> Tensor:
    """Of the same storage and version (private; checked on torch 2.11 to 2.14)."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _tensors_of(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor)]


def _versions(tensors: list[Tensor]) -> list[int]:
    return [t._version for t in tensors]


def _storage(tensor: Tensor) -> int:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()._cdata


def _key(op: Any, args: tuple[Any, ...]) -> Hashable:
    return op, *(t.shape for t in tree_leaves(args) if isinstance(t, Tensor))


@contextmanager
def _keeping(kept: _Kept) -> Iterator[None]:
    """Around forward, within the hooks by which torch's checkpointing sees what autograd saves.

    Recomputing ends with the last of that: what comes after it, such as the output of the last matmul, is let go.
    """
    pack, unpack = _hooks_for_saved_tensors()
    needed = 0

    def count(saved: Tensor) -> object:
        nonlocal needed
        needed = len(mode.outputs)
        return pack(saved)

    with _Keeping(kept) as mode, saved_tensors_hooks(count, unpack):
        yield
    by_key: dict[Hashable, deque[_Output]] = defaultdict(deque)
    for key, output in mode.outputs[:needed]:
        by_key[key].append(output)
    mode.outputs.clear()  # the hooks live on
    kept.outputs = dict(by_key)


def _hooks_for_saved_tensors() -> tuple[Callable[[Tensor], object], Callable[[object], Tensor]]:
    """The innermost ones (private; checked on torch 2.11 to 2.14)."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    assert hooks is not None
    return hooks


class _Keeping(TorchDispatchMode):
    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self.outputs: list[tuple[Hashable, _Output]] = []
        self._kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        tensors = func(*args, **(kwargs or {}))
        if self._kept.takes(func, args, kwargs or {}):
            self.outputs.append((_key(func, args), _Output(tensors)))
        elif func.__name__.split(".")[0] in VERSIONED_APART:
            any(output.watches(args[0], tensors) for _, output in reversed(self.outputs))
        return tensors


class _Recomputing(TorchDispatchMode):
    """Gives what is kept, and NaN for what only a sum takes that is kept; once it has ended, as in a second backward, all is
    computed."""

    def __init__(self, kept: _Kept, refusal: Refusal) -> None:
        super().__init__()
        self._kept, self._refusal = kept, refusal
        self._given: set[Hashable] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kept, kwargs = self._kept, kwargs or {}
        if kept.outputs and kept.takes_sum_of(func, args):
            return _unsummed(*args[-2:])
        takes = kept.outputs and kept.takes(func, args, kwargs)
        if not takes or (key := _key(func, args)) not in kept.outputs:
            return func(*args, **kwargs)
        if not kept.outputs[key]:
            raise self._refusal(OTHERWISE)
        self._given.add(key)
        output = kept.outputs[key].popleft()
        if output.is_changed():
            raise self._refusal(
                "changes in place the output of a matmul or attention, which is kept for backward"
            )
        return output.tensors

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc_val, exc_tb)
        left = {key for key, outputs in self._kept.outputs.items() if outputs}
        self._kept.outputs = {}
        # Torch's checkpointing ends it with an exception of its own.
        if (exc_type is None or exc_type.__module__ == "torch.utils.checkpoint") and left & self._given:
            raise self._refusal(OTHERWISE)


OTHERWISE = "has other matmuls, attention or messages of the same shapes when it is computed again, such as one that it computes once and keeps"


def _unsummed(first: DTensor, second: DTensor) -> DTensor:
    """NaN in place of the matmul of a row-wise layer."""
    whole = torch.Size([first.shape[0], second.shape[1]])
    local, columns = first.to_local(), second.to_local().shape[1]
    nan = torch.full((len(local), columns), torch.nan, dtype=first.dtype, device=local.device)
    return DTensor.from_local(
        nan, first.device_mesh, [Partial()], run_check=False, shape=whole, stride=(whole[1], 1)
    )


def _is_partial_sum(op: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is the matmul of a row-wise layer, along a dim that is sharded."""
    if op.__name__.split(".")[0] not in ("mm", "addmm"):
        return False
    first, second = args[-2:]
    if not (isinstance(first, DTensor) and isinstance(second, DTensor)) or first.device_mesh.size() == 1:
        return False
    return first.placements == (Shard(1),) and second.placements == (Shard(0),)
