"""What one optimizer step holds on this rank, by kind: parameters, gradients, optimizer state, activations, the rest.

A dispatch mode notes each storage as an op makes it and as it is freed, on any device; FSDP grows and shrinks
the storages of gathered weights by `resize_`, which is noted too. Kinds are known only in the end (a buffer turns
out to be a gradient), so the step is recorded first and replayed afterwards. An op's internal workspace is not seen:
on CUDA the allocator's own peak is reported too.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpresearch.ledger.entries import MEMORY_KINDS, MemoryUse

FORWARD = ("forward", "loss")


class MemoryLedger(TorchDispatchMode):
    """Records what is held while entered; `phase` names the part of the step.

    memory = MemoryLedger(model, optimizer)
    with memory:
        with memory.phase("forward"):
            ...
        memory.note_gradients()
    memory.held()

    Args:
        remainders: of split master weights, which the optimizer updates instead of these.
    """

    counted: tuple[type[Tensor], ...] = (Tensor, nn.Parameter)
    """Classes of the tensors that hold memory: a subclass such as DTensor wraps one that comes here by itself, and a fake tensor, by
    which DTensor infers the shape of an op's output, holds none."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, remainders: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self._model, self._optimizer, self._remainders = model, optimizer, remainders
        self._next_id = itertools.count()
        self._live: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()
        """The ids of live storages."""
        self._changes: list[tuple[int, int | None]] = []
        """(id of a storage, bytes by which it grew, None if it was freed), in order of time."""
        self._kinds: dict[int, str] = {}
        self._phase = ""
        self._from_forward: set[int] = set()
        self.allocator_peak_bytes: int | None = None
        """Peak of the CUDA allocator, which includes the internal workspace of ops."""

    def __enter__(self) -> MemoryLedger:
        # Where what it moves are not the model's parameters, they are float32 masters of them.
        masters = [*self._remainders] or _trained_by(self._optimizer)
        self._set_kind("optimizer", [*_state_of(self._optimizer), *masters])
        self._set_kind("parameters", [*self._model.parameters(), *self._model.buffers()])
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
        self._resize, ledger = torch.UntypedStorage.resize_, self

        def resize_and_note(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            before = storage.nbytes()
            result = ledger._resize(storage, size)
            number = ledger._storage_id(storage, before)
            ledger._changes.append((number, size - before))
            ledger._kinds.setdefault(number, "temporaries")
            return result

        torch.UntypedStorage.resize_ = resize_and_note  # pyrefly: ignore[bad-assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:  # pyrefly: ignore[bad-override]
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize
        self._set_kind("optimizer", _state_of(self._optimizer))
        if torch.cuda.is_initialized():
            self.allocator_peak_bytes = torch.cuda.max_memory_allocated()

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """What forward and loss created and is still alive when backward begins are activations."""
        if phase == "backward":
            alive = set(self._live.values()) & self._from_forward
            self._kinds |= dict.fromkeys(alive - self._kinds.keys(), "activations")
            self._from_forward.clear()
        self._phase = phase
        yield
        self._phase = ""

    def note_gradients(self) -> None:
        """Call when gradients are complete, and before the optimizer drops them."""
        self._set_kind("gradients", [p.grad for p in _trained_by(self._optimizer) if p.grad is not None])

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let DTensor turn the op into local ones, which come here again
        result = func(*args, **(kwargs or {}))
        of_fsdp = func.namespace == "fsdp"  # buffers for gathered weights are not activations
        # A view makes no memory. Of what no op has made: gloo's copy of what it reduces, which it splits where it is waited for.
        of_backend = func.is_view and self._phase not in ("", *FORWARD)
        leaves = (result,) if isinstance(result, Tensor) else tree_leaves(result)
        for tensor in [*leaves, *tree_leaves((args, kwargs))] if of_fsdp else leaves:
            if type(tensor) in self.counted and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                if of_backend and storage not in self._live:
                    continue
                number = self._storage_id(storage, None)
                if of_fsdp:
                    self._kinds.setdefault(number, "temporaries")
                if self._phase in FORWARD:
                    self._from_forward.add(number)
        return result

    def _set_kind(self, kind: str, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            self._kinds[self._storage_id(local.untyped_storage(), None)] = kind

    def _storage_id(self, storage: torch.UntypedStorage, nbytes: int | None) -> int:
        """The storage's id; a new storage gets one, and counts from now on until it is freed."""
        if storage not in self._live:
            self._live[storage] = number = next(self._next_id)
            self._changes.append((number, storage.nbytes() if nbytes is None else nbytes))
            weakref.finalize(storage, self._changes.append, (number, None)).atexit = False
        return self._live[storage]

    def held(self) -> list[MemoryUse]:
        """The recorded changes, replayed with the kinds that storages turned out to have."""
        now, most, at_peak = (dict.fromkeys(MEMORY_KINDS, 0) for _ in range(3))
        peak = 0
        for _, kind, grown in self._replayed():
            now[kind] += grown
            most[kind] = max(most[kind], now[kind])
            if (total := sum(now.values())) > peak:
                peak, at_peak = total, dict(now)
        return [MemoryUse(kind, most[kind], at_peak[kind]) for kind in MEMORY_KINDS]

    def _replayed(self) -> Iterator[tuple[int, str, int]]:
        """(id of a storage, its kind, bytes by which it grew) of each change."""
        sizes: dict[int, int] = {}
        for number, grown in self._changes:
            grown = -sizes[number] if grown is None else grown
            sizes[number] = sizes.get(number, 0) + grown
            yield number, self._kinds.get(number, "temporaries"), grown


def _state_of(optimizer: Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


def _trained_by(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
