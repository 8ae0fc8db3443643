"""A recorded step as plain data: every op of rank 0 in the order of its issue, with shapes and bytes. No torch."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tpresearch.ledger.entries import Entry, Event, entries_of

Touched = tuple[tuple[int, int], ...]
"""(number of a storage, bytes of it that are touched) of each tensor."""


class Op(NamedTuple):
    """One op of the step. Views and allocations, which run nothing on a device, are left out."""

    phase: str
    kind: str
    """gemm, attention, collective, wait, optimizer, or other: what is priced by its bytes."""
    name: str
    reads: Touched
    writes: Touched
    element: int
    """Bytes per element of its first tensor."""
    shape: tuple[int, ...]
    """gemm: (products, m, n, k). attention: (b, heads, kv_heads, s, s_keys, d, 1 for backward,
    1 for causal). Else empty."""
    event: Event | None
    """What a collective sends."""
    fused: int
    """Number of the module call that a GPU runs as one kernel, such as an RMSNorm; -1 for an op by itself."""

    @property
    def bytes_moved(self) -> int:
        return sum(size for _, size in self.reads) + sum(size for _, size in self.writes)


class Change(NamedTuple):
    """A storage that came, went, grew or shrank."""

    moment: str
    kind: str
    """One of `MEMORY_KINDS`."""
    grown: int
    """Bytes."""


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
    """What `memory` sums up; not kept on disk."""

    @property
    def recorded(self) -> tuple[tuple[Op, ...], ...]:
        """Its micro-batches, and what is done once."""
        return (*self.micro_batches, self.end)

    def ops(self, micro_batches: int) -> list[Op]:
        """The whole step with this many micro-batches: all but the first and the last are like the one before the last."""
        return [op for part in self.parts(micro_batches) for op in part]

    def parts(self, micro_batches: int) -> list[tuple[Op, ...]]:
        recorded = self.micro_batches
        if micro_batches <= len(recorded):
            return [*recorded[: micro_batches - 1], recorded[-1], self.end]
        between = recorded[len(recorded) // 2]
        return [recorded[0], *[between] * (micro_batches - 2), recorded[-1], self.end]

    def entries(self, micro_batches: int) -> list[Entry]:
        """The communication ledger of the whole step."""
        return entries_of(op.event for op in self.ops(micro_batches) if op.event)


def save(trace: Trace, path: Path) -> None:
    """Write a trace as compressed JSON."""
    plain = {"micro_batches": trace.micro_batches, "end": trace.end, "memory": trace.memory}
    text = json.dumps(plain, default=lambda event: [getattr(event, name) for name in _EVENT])
    path.write_bytes(gzip.compress(text.encode(), 1))


def load(path: Path) -> Trace:
    plain = json.loads(gzip.decompress(path.read_bytes()))
    parts = tuple(_ops(part) for part in plain["micro_batches"])
    return Trace(parts, _ops(plain["end"]), plain["memory"])


_EVENT = ("axis", "phase", "issuer", "collective", "tensor_bytes", "ranks")


def _ops(plain: Sequence[list[Any]]) -> tuple[Op, ...]:
    return tuple(
        Op(
            phase,
            kind,
            name,
            _pairs(reads),
            _pairs(writes),
            element,
            tuple(shape),
            event and Event(*event),
            fused,
        )
        for phase, kind, name, reads, writes, element, shape, event, fused in plain
    )


def _pairs(plain: list[list[int]]) -> Touched:
    return tuple((number, size) for number, size in plain)
