"""What a step holds at each of its moments, as the cluster's device would hold it: the memory ledger of a step on fake tensors."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from tpresearch.ledger.entries import MEMORY_KINDS
from tpresearch.ledger.memory import MemoryLedger
from tpresearch.simulate.trace import Change, of_fewer

propagating: list[None] = []
"""Not empty while DTensor runs an op on shapes of full tensors, to infer its output: not part of a step, so not recorded."""


class DeviceMemory(MemoryLedger):
    """The memory ledger by moments, on a GPU without intermediate tensors that only a CPU creates in what CUDA runs as one kernel.

    A moment is a phase of a micro-batch; of backward, in which activations go and gradients come, its beginning, up to
    the end of the last block, and its end, from the first block on. The peak of each is a sum over blocks, so that
    shallow models can be extrapolated, though which moment holds most may change with depth.
    """

    counted = (*MemoryLedger.counted, FakeTensor)
    """All are fake here. (FakeTensor: private, torch 2.13 and 2.14.)"""

    def __init__(self, model: nn.Module, optimizer: Optimizer, remainders: Iterable[Tensor] = ()) -> None:
        super().__init__(model, optimizer, remainders)
        self._excluded: set[int] = set()
        self._marks: list[tuple[int, str]] = []
        """(number of changes before it, name) of each moment."""
        self._phases = 0

    def exclude(self, tensor: Tensor) -> None:
        self._excluded.add(self._storage_id(tensor.untyped_storage(), None))

    def include(self, tensor: Tensor) -> None:
        self._excluded.discard(self._storage_id(tensor.untyped_storage(), None))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """A waited-for tensor is the same one; of a fake tensor torch would make another."""
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        if propagating:
            return func(*args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def begin_moment(self, moment: str) -> None:
        """Begin a moment of the phase, which lasts until the next; one without a name is between two others."""
        named = f"{self._phases} {moment}" if moment else f"{BETWEEN} {len(self._marks) + 1}"
        self._marks.append((len(self._changes), named))

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        with super().phase(phase):
            self.begin_moment(phase)
            yield
        self.begin_moment("")
        self._phases += 1

    def changes(self) -> tuple[Change, ...]:
        """All changes in order of time, with 0 bytes for what is excluded; between moments, one change per kind."""
        found: list[Change] = []
        every = list(self._replayed())
        marks = [(0, f"{BETWEEN} 0"), *self._marks, (len(every), "")]
        for (start, moment), (end, _) in itertools.pairwise(marks):
            within = [
                Change(moment, kind, 0 if number in self._excluded else grown)
                for number, kind, grown in every[start:end]
            ]
            if moment.startswith(BETWEEN):
                sums = dict.fromkeys(MEMORY_KINDS, 0)
                for _, kind, grown in within:
                    sums[kind] += grown
                within = [Change(moment, kind, grown) for kind, grown in sums.items()]
            found += within
        return tuple(found)


class KeptInput(torch.autograd.Function):
    """The output of a single kernel, which keeps its input for backward: op by op, one in bfloat16 is let go once there is a wider
    copy of it."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, given: Tensor) -> Tensor:
        ctx.save_for_backward(given)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyrefly: ignore[bad-override]
        return gradient, None


BETWEEN = "between"
"""Prefix of the time between two moments, whose peak does not matter."""


def by_moment(changes: Iterable[Change]) -> dict[str, int]:
    """Bytes as "moment/kind", each moment where it holds most."""
    found: dict[str, int] = {}
    now = dict.fromkeys(MEMORY_KINDS, 0)
    last, total, peak = "", 0, -1
    for moment, kind, grown in changes:
        if moment != last:
            last, peak = moment, -1
        now[kind] += grown
        total += grown
        if total > peak and not moment.startswith(BETWEEN):
            peak = total
            found |= {f"{moment}/{kind}": size for kind, size in now.items()}
    return found


MICRO_BATCH = ("forward", "loss", "backward")
"""Phases of each micro-batch, which are numbered from 0; those of the end of a step follow."""


def peak_moment(by_moment: Mapping[str, float], micro_batches: int | None = None) -> dict[str, float]:
    """Bytes by kind at the moment that holds most.

    Args:
        micro_batches: their number; of more that were recorded, those of `of_fewer` count. None for all that were recorded.
    """
    moments: dict[str, dict[str, float]] = {}
    for name, size in by_moment.items():
        moment, _, kind = name.partition("/")
        moments.setdefault(moment, {})[kind] = size
    if micro_batches:
        place = {moment: int(moment.split()[0]) for moment in moments}
        last = max(number for moment, number in place.items() if moment.split()[1] == "forward")
        recorded = range(0, last + 1, len(MICRO_BATCH))
        left_out = {
            first + i
            for first in {*recorded} - {*of_fewer(recorded, micro_batches)}
            for i in range(len(MICRO_BATCH))
        }
        moments = {moment: held for moment, held in moments.items() if place[moment] not in left_out}
    return max(moments.values(), key=lambda held: sum(held.values()))


@contextmanager
def note_propagation() -> Iterator[None]:
    """Inside it, `propagating` is set while DTensor propagates shapes.

    (`ShardingPropagator._propagate_tensor_meta_non_cached`: private, torch 2.11 to 2.14.)
    """
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    original = ShardingPropagator._propagate_tensor_meta_non_cached

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        propagating.append(None)
        try:
            return original(self, *args, **kwargs)
        finally:
            propagating.pop()

    with patch.object(ShardingPropagator, original.__name__, noted):
        yield
