"""What a step sent and held, as plain data: the content of ledger.json. Nothing here needs torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

PHASES = ("forward", "loss", "backward", "clip", "optimizer")
"""The parts of an optimizer step, in their order."""

ISSUING_PHASES = ("loss", "clip", "optimizer")
"""Phases that issue their own collectives."""

MEMORY_KINDS = ("parameters", "gradients", "optimizer", "activations", "temporaries")


@dataclass(frozen=True)
class Entry:
    """Collectives of one kind, over one axis, in one phase of a step, on one rank, summed."""

    axis: str
    phase: str
    """One of `PHASES`."""
    issuer: str
    """dtensor (the tensor plan), fsdp (the data plan), step (partial gradients), loss, clip or optimizer."""
    collective: str
    count: int
    tensor_bytes: int
    """Bytes of the full tensors: as gathered, or before being scattered or reduced."""
    sent_bytes: int
    """Bytes that this rank sends, by the ring algorithms."""


@dataclass(frozen=True)
class Event:
    """One collective, in the order in which a rank issued it."""

    axis: str
    phase: str
    issuer: str
    collective: str
    tensor_bytes: int
    ranks: int


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one kind on one rank during one step."""

    kind: str
    """parameters (with buffers), gradients, optimizer (its state), activations (created in forward, kept for
    backward), or temporaries (all else: gathered weights, unreduced gradients, short-lived results)."""
    most_bytes: int | None
    """Maximum of this kind over the step; None for a predicted step, of which only the peak of the total is known."""
    at_peak_bytes: int
    """At the moment of the total's peak; these add up to the peak."""


def ring_bytes(collective: str, tensor_bytes: int, ranks: int) -> int:
    """Bytes that each of `ranks` sends for a collective on a whole tensor of `tensor_bytes`.

    A ring of p ranks passes n/p bytes p-1 times for an all-gather or a reduce-scatter, and does both for an
    all-reduce (Patarasuk and Yuan 2009; the same accounting as nccl-tests' PERFORMANCE.md). Of a gather or scatter
    the rank that has the whole counts, of a broadcast or reduce the mean over ranks; a `send` is to one rank.
    """
    if collective == "send":
        return tensor_bytes
    rounds = 2 if collective == "all_reduce" else 1
    return rounds * tensor_bytes * (ranks - 1) // ranks


def entries_of(events: Iterable[Event]) -> list[Entry]:
    """Events summed by axis, phase, issuer and collective, in that order."""
    sums: dict[tuple[str, str, str, str], list[int]] = {}
    for event in events:
        entry = sums.setdefault((event.axis, event.phase, event.issuer, event.collective), [0, 0, 0])
        sent = ring_bytes(event.collective, event.tensor_bytes, event.ranks)
        for index, amount in enumerate((1, event.tensor_bytes, sent)):
            entry[index] += amount
    return [Entry(*key, *amounts) for key, amounts in sorted(sums.items())]


@dataclass(frozen=True)
class Expected:
    """What closed formulas expect of a step on rank 0; None if there are none."""

    sent: list[Entry] | None
    held: dict[str, int | None]
    """Bytes by kind of memory."""

    def for_unused_parameters(self) -> Expected:
        """Without formulas, where a parameter has no part in the loss: which one cannot be known in advance."""
        return Expected(None, {kind: self.held[kind] if kind == "parameters" else None for kind in self.held})


@dataclass(frozen=True)
class StepLedger:
    """What one step sent and held on rank 0, and what formulas expect."""

    sent: list[Entry]
    held: list[MemoryUse]
    """Empty where blocks are compiled: their memory does not go through the dispatcher."""
    allocator_peak_bytes: int | None
    expected: Expected

    @property
    def sent_bytes(self) -> int:
        return sum(entry.sent_bytes for entry in self.sent)

    @property
    def most_bytes(self) -> dict[str, int]:
        """The maximum of each kind of memory; empty where it is not known."""
        return {use.kind: use.most_bytes for use in self.held if use.most_bytes is not None}

    def as_json(self) -> dict[str, Any]:
        """The content of ledger.json; null where there is no formula."""
        formulas = self.expected.sent
        return {
            "measured": [asdict(entry) for entry in self.sent],
            "expected": None if formulas is None else [asdict(entry) for entry in formulas],
            "memory": {
                "measured": [asdict(use) for use in self.held],
                "expected": self.expected.held,
                "peak_bytes": sum(use.at_peak_bytes for use in self.held) if self.held else None,
                "allocator_peak_bytes": self.allocator_peak_bytes,
            },
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """What `as_json` has written."""
        memory, formulas = content["memory"], content["expected"]
        sent = [Entry(**entry) for entry in content["measured"]]
        expected = Expected(formulas and [Entry(**entry) for entry in formulas], memory["expected"])
        held = [MemoryUse(**use) for use in memory["measured"]]
        return cls(sent, held, memory["allocator_peak_bytes"], expected)

    def summary(self) -> dict[str, Any]:
        """For summary.json: bytes sent by mesh axis and by collective, and memory by kind, maximum and at the peak.

        What formulas expect by collective is None if there are none.
        """
        formulas = self.expected.sent
        at_peak = {use.kind: use.at_peak_bytes for use in self.held}
        expected = None if formulas is None else _sum_bytes(formulas, _axis_and_collective)
        return {
            "comm/bytes_per_step_by_axis": _sum_bytes(self.sent, lambda entry: entry.axis),
            "comm/bytes_per_step_by_collective": _sum_bytes(self.sent, _axis_and_collective),
            "comm/expected_bytes_per_step_by_collective": expected,
            **({"memory/held_bytes": self.most_bytes} if self.most_bytes else {}),
            **({"memory/at_peak_bytes": at_peak} if at_peak else {}),
        }


def _sum_bytes(entries: Iterable[Entry], part: Callable[[Entry], str]) -> dict[str, int]:
    """Bytes sent in each part."""
    sums: dict[str, int] = {}
    for entry in entries:
        sums[part(entry)] = sums.get(part(entry), 0) + entry.sent_bytes
    return sums


def _axis_and_collective(entry: Entry) -> str:
    return f"{entry.axis}/{entry.collective}"
