"""Activation checkpointing of a block: what it keeps for backward and what it computes again, and the refusal of a block that
would compute other numbers the second time.
"""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor, Partial, Shard
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Checkpointing
from tpresearch.plan.probe import buffer_versions, changed_buffers


def checkpointed(forward: Callable[..., Any], kind: Checkpointing) -> Callable[..., Any]:
    """The function under activation checkpointing, to be compiled: for backward it keeps only what the given kind says."""
    if kind is Checkpointing.full:
        return functools.partial(checkpoint, forward, use_reentrant=False)
    if kind is Checkpointing.selective:
        # Dynamo warns that in-place ops may go wrong with a policy: those of temporary tensors do not (compared with plain
        # gradients, torch 2.11 and 2.13), others are refused below.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        context = functools.partial(create_selective_checkpoint_contexts, save_expensive_ops)
        return functools.partial(checkpoint, forward, use_reentrant=False, context_fn=context)
    return forward


def checkpointed_eagerly(
    block: nn.Module,
    kind: Checkpointing,
    forward: Callable[..., Any] | None = None,
    sums_at_once: bool = True,
) -> Callable[..., Any]:
    """The block's forward, or the given one for it, under activation checkpointing; not to be compiled.

    Args:
        sums_at_once: whether a layer with a partial sum has it summed over ranks before anything else takes it, as all of our rules do.

    The result raises a ConfigError for a block that changes in place what is kept for backward, which torch notices only
    there; or its inputs or buffers, which recomputing would find changed and change again, unnoticed.
    """
    forward = forward or block.forward
    if kind not in (Checkpointing.full, Checkpointing.selective):
        return forward
    context = functools.partial(_contexts, block, kind, sums_at_once)
    run = functools.partial(checkpoint, forward, use_reentrant=False, context_fn=context)

    def refuse(changed: Changed, _: Any) -> None:
        why = f"changes {changed[0][0]}, which recomputing would find changed and change again"
        raise _refusal(block, kind, why, "none")

    return _watched(block, run, refuse)


def checked_compiled(block: nn.Module, run: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled forward of a block.

    It raises a ConfigError where compiled code has changed a tensor in place that it keeps for backward: inductor recomputes
    from the changed one, and gradients would be wrong (torch 2.13).
    """

    def refuse(changed: Changed, output: Any) -> None:
        kept = _kept_by_compiled_code(output)
        for what, tensor in changed:
            if tensor.untyped_storage() in kept:
                why = f"the block {type(block).__name__} changes {what} in place and computes with it: compiled, its gradients would be wrong"
                legal = "false, or a block that puts another tensor in its place"
                raise ConfigError("parallel.compile", True, why, legal, fix={"parallel.compile": "false"})

    return _watched(block, run, refuse)


Changed = list[tuple[str, Tensor]]
"""What a forward has changed in place, in words, and the tensor."""


def _watched(
    block: nn.Module, run: Callable[..., Any], refuse: Callable[[Changed, Any], None]
) -> Callable[..., Any]:
    """The forward `run` of a block; in training, `refuse` gets its buffers and inputs that it has changed, if any, and its output."""

    @functools.wraps(block.forward)
    def run_and_watch(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return run(*args, **kwargs)
        buffers = buffer_versions(block)
        given = [(t, t._version) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        output = run(*args, **kwargs)
        changed = [(f"its buffer {name}", t) for name, t in changed_buffers(block, buffers).items()]
        changed += [("its input", t) for t, version in given if t._version != version]
        if changed:
            refuse(changed, output)
        return output

    return run_and_watch


def _kept_by_compiled_code(output: Any) -> set[torch.UntypedStorage]:
    """The storages of what a compiled forward that has made this output keeps for backward (private; read in torch 2.11 to
    2.14)."""
    nodes = [t.grad_fn for t in tree_leaves(output) if isinstance(t, Tensor) and t.grad_fn is not None]
    for _ in range(4):  # views and DTensors are made of its outputs
        for node in nodes:
            if "CompiledFunction" in type(node).__name__:
                return {t.untyped_storage() for t in node.saved_tensors if t is not None}  # pyrefly: ignore[missing-attribute]
        nodes = [after for node in nodes for after, _ in node.next_functions if after is not None]
    return set()


def _contexts(
    block: nn.Module, kind: Checkpointing, sums_at_once: bool
) -> tuple[AbstractContextManager[object], AbstractContextManager[object]]:
    """Around forward, and around recomputing it: there the function modes that forward runs in are entered again."""
    modes = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
    if kind is Checkpointing.full:
        return nullcontext(), _Within(*modes)
    kept = _Kept(block, sums_at_once)
    return _keeping(kept), _Within(_Recomputing(kept), *modes)


class _Within(ExitStack):
    """All of these contexts, each within the one before; entered once more for each backward."""

    def __init__(self, *contexts: AbstractContextManager[object]) -> None:
        super().__init__()
        self._contexts = contexts

    def __enter__(self) -> Self:
        for context in self._contexts:
            self.enter_context(context)
        return self


def _refusal(block: nn.Module, kind: Checkpointing, why: str, legal: str) -> ConfigError:
    key, text = "parallel.activation_checkpointing", f"the block {type(block).__name__} {why}"
    return ConfigError(key, kind, text, f"{legal}, or a block that does not", fix={key: "none"})


def save_expensive_ops(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
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


@dataclass
class _Kept:
    """What slow ops of a block gave in forward, in order, with the versions of these tensors, until it is computed again.

    Where sums are formed at once, of a row-wise layer it is what the ranks have summed, and not what each gives to the sum,
    which under sequence parallelism is as many times larger as there are ranks.
    """

    block: nn.Module
    sums_at_once: bool
    outputs: deque[tuple[Any, list[int]]] = field(default_factory=deque)

    def keeps(self, op: Any, args: tuple[Any, ...]) -> bool:
        return _is_slow(op) and not self.is_summed_later(op, args)

    def is_summed_later(self, op: Any, args: tuple[Any, ...]) -> bool:
        return self.sums_at_once and _is_partial_sum(op, args)


@contextmanager
def _keeping(kept: _Kept) -> Iterator[None]:
    """Around forward, within the hooks by which torch's checkpointing sees what autograd saves.

    Recomputing ends with the last of that: what comes after it, such as the output of the last matmul, is let go.
    """
    pack, unpack = _hooks_for_saved_tensors()
    needed = 0

    def count(saved: Tensor) -> object:
        nonlocal needed
        needed = len(kept.outputs)
        return pack(saved)

    with saved_tensors_hooks(count, unpack), _Keeping(kept):
        yield
    while len(kept.outputs) > needed:
        kept.outputs.pop()


def _hooks_for_saved_tensors() -> tuple[Callable[[Tensor], object], Callable[[object], Tensor]]:
    """The innermost ones (private; checked on torch 2.11 to 2.14)."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    assert hooks is not None
    return hooks


class _Keeping(TorchDispatchMode):
    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._kept.keeps(func, args):
            self._kept.outputs.append((tree_map_only(Tensor, _alias, output), _versions(output)))
        return output


class _Recomputing(TorchDispatchMode):
    """Takes what is kept, in order, with NaN for what only a sum takes that is kept; once nothing is left, as in a second
    backward, all is computed."""

    def __init__(self, kept: _Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kept = self._kept
        if kept.outputs and kept.is_summed_later(func, args):
            return _unsummed(*args[-2:])
        if not kept.outputs or not kept.keeps(func, args):
            return func(*args, **(kwargs or {}))
        output, versions = kept.outputs.popleft()
        if _versions(output) != versions:
            why = "changes in place the output of a matmul or attention, which is kept for backward"
            raise _refusal(kept.block, Checkpointing.selective, why, "none or full")
        return output


def _alias(tensor: Tensor) -> Tensor:
    """Of the same storage and version, but without the graph of backward, which holds what is kept (private; checked on torch
    2.11 to 2.14)."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _versions(output: Any) -> list[int]:
    return [t._version for t in tree_leaves(output) if isinstance(t, Tensor)]


def _unsummed(first: DTensor, second: DTensor) -> DTensor:
    """NaN in place of the matmul of a row-wise layer."""
    whole = torch.Size([first.shape[0], second.shape[1]])
    local, columns = first.to_local(), second.to_local().shape[1]
    nan = local.new_full((len(local), columns), torch.nan)
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
