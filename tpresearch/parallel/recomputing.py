"""Activation checkpointing of a block: what it keeps for backward and what it computes again, and the refusal of a block that
would compute other numbers the second time.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Checkpointing
from tpresearch.parallel.kept import keeping_slow_ops, save_slow_ops
from tpresearch.plan.meta import buffer_versions, changed_buffers


def checkpointed(forward: Callable[..., Any], kind: Checkpointing) -> Callable[..., Any]:
    """The function under activation checkpointing, to be compiled: for backward it keeps only what the given kind says."""
    if kind is Checkpointing.full:
        return functools.partial(checkpoint, forward, use_reentrant=False)
    if kind is Checkpointing.selective:
        # Dynamo warns that in-place ops may go wrong with a policy: those of temporary tensors do not (compared with plain
        # gradients, torch 2.11 and 2.13), others are refused below.
        logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
        context = functools.partial(create_selective_checkpoint_contexts, save_slow_ops)
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

    @functools.wraps(block.forward)
    def run_or_refuse(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            why = "takes a gradient by a transform of torch.func, which allows no checkpoint around it"
            raise _refusal(block, kind, why, "none") from None

    return _watched(block, run_or_refuse, refuse)


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
    keeping, recomputing = keeping_slow_ops(
        sums_at_once, lambda why: _refusal(block, Checkpointing.selective, why, "none or full")
    )
    return keeping, _Within(recomputing, *modes)


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
