"""A recorded step as plain data: every op of rank 0 in the order of its issue, with shapes and bytes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

from tpresearch.ledger.entries import Entry, Event, entries_of

Part = TypeVar("Part")
Touched = tuple[tuple[int, int], ...]
"""(number of a storage, bytes of it that are touched) of each tensor."""


class Op(NamedTuple):
    """One op of the step. Views and allocations, which run nothing on a device, are left out."""

    phase: str
    kind: str
    """gemm, convolution, attention, collective, wait, optimizer, or other: what is priced by its bytes."""
    name: str
    reads: Touched
    writes: Touched
    element: int
    """Bytes per element of its first tensor, or of a matmul's factors."""
    shape: tuple[int, ...]
    """gemm, convolution: (products, m, n, k). attention: (b, heads, kv_heads, s, s_keys, d, 1 for backward,
    1 for causal). Else empty."""
    event: Event | None
    """What a collective sends."""
    fused: int
    """Number of the module call that a GPU runs as one kernel, such as an RMSNorm; -1 for an op by itself."""

    @property
    def bytes_moved(self) -> int:
        """Those of its tensors; `prices.moved_bytes` says where an op moves fewer or more."""
        return sum(size for _, size in self.reads) + sum(size for _, size in self.writes)


class Change(NamedTuple):
    """A storage that was created, freed, or resized."""

    moment: str
    kind: str
    """One of `MEMORY_KINDS`."""
    grown: int
    """Bytes."""


def of_fewer(recorded: Sequence[Part], micro_batches: int) -> Sequence[Part]:
    """Of recorded micro-batches those of a step that has fewer. A single one sets gradients, as the first of two does; of three the
    last alone sums them over replicas.
    """
    if micro_batches >= len(recorded):
        return recorded
    if micro_batches == 1 and len(recorded) == 2:
        return recorded[:1]
    return [*recorded[: micro_batches - 1], recorded[-1]]


@dataclass(frozen=True)
class Trace:
    """One optimizer step of rank 0."""

    micro_batches: tuple[tuple[Op, ...], ...]
    """Each one's forward to backward: the first, those between, the last."""
    end: tuple[Op, ...]
    """Once per step: partial gradients, clipping, update."""
    memory: dict[str, int]
    """Bytes by "moment/kind", each moment of the step where it holds most; see `device_memory`."""
    changes: tuple[Change, ...] = field(default=(), compare=False, repr=False)
    """The changes that `memory` summarises."""

    @property
    def recorded(self) -> tuple[tuple[Op, ...], ...]:
        """Its micro-batches, and what is done once."""
        return (*self.micro_batches, self.end)

    def ops(self, micro_batches: int) -> list[Op]:
        """The whole step with this many micro-batches: all but the first and the last are copies of the middle one."""
        *first, last = of_fewer(self.micro_batches, micro_batches)
        between = [self.micro_batches[len(self.micro_batches) // 2]] * (micro_batches - len(first) - 1)
        return [op for part in (*first, *between, last, self.end) for op in part]

    def entries(self, micro_batches: int) -> list[Entry]:
        """The communication ledger of the whole step."""
        return entries_of(op.event for op in self.ops(micro_batches) if op.event)
