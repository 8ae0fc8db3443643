"""One early step under both ledgers: what it sends and what it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from tpresearch.ledger.communication import Entry, Ledger
from tpresearch.ledger.memory import Held, MemoryLedger


class Counted:
    """Counts one step while it is entered; `mark` tells it the phase."""

    def __init__(self, mesh: DeviceMesh, model: nn.Module, optimizer: Optimizer) -> None:
        self.sent, self.held = Ledger(mesh), MemoryLedger(model, optimizer)
        self._stack = ExitStack()

    def __enter__(self) -> Counted:
        self._stack.enter_context(self.sent)
        self._stack.enter_context(self.held)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @contextmanager
    def mark(self, phase: str) -> Iterator[None]:
        with self.sent.mark(phase), self.held.mark(phase):
            yield


@dataclass(frozen=True)
class Expected:
    """What closed formulas say of a step on rank 0; None where there are none."""

    sent: list[Entry] | None
    held: dict[str, int | None]
    """Bytes by kind of memory."""


@dataclass(frozen=True)
class StepCount:
    """What one step sent and held on rank 0, beside what formulas say."""

    sent: list[Entry]
    held: list[Held]
    allocator_peak_bytes: int | None
    expected: Expected

    def as_json(self) -> dict[str, Any]:
        """The content of ledger.json; null where there is no formula."""
        formulas = self.expected.sent
        return {
            "measured": [asdict(entry) for entry in self.sent],
            "expected": None if formulas is None else [asdict(entry) for entry in formulas],
            "memory": {
                "measured": [asdict(kind) for kind in self.held],
                "expected": self.expected.held,
                "peak_bytes": sum(kind.at_peak_bytes for kind in self.held),
                "allocator_peak_bytes": self.allocator_peak_bytes,
            },
        }

    def summary(self) -> dict[str, Any]:
        """For summary.json: bytes sent by mesh axis and by collective, and what was held of each kind, at most and when all was most.

        What formulas expect by collective is None where there are none.
        """
        formulas = self.expected.sent
        return {
            "comm/bytes_per_step_by_axis": _sums(self.sent, lambda entry: entry.axis),
            "comm/bytes_per_step_by_collective": _sums(self.sent, _axis_and_collective),
            "comm/expected_bytes_per_step_by_collective": None
            if formulas is None
            else _sums(formulas, _axis_and_collective),
            "memory/held_bytes": {kind.kind: kind.most_bytes for kind in self.held},
            "memory/at_peak_bytes": {kind.kind: kind.at_peak_bytes for kind in self.held},
        }


def _sums(entries: Iterable[Entry], part: Callable[[Entry], str]) -> dict[str, int]:
    """Bytes sent in each part."""
    sums: dict[str, int] = {}
    for entry in entries:
        sums[part(entry)] = sums.get(part(entry), 0) + entry.sent_bytes
    return sums


def _axis_and_collective(entry: Entry) -> str:
    return f"{entry.axis}/{entry.collective}"


def count_of(counted: Counted, expected: Expected) -> StepCount:
    return StepCount(counted.sent.entries(), counted.held.held(), counted.held.allocator_peak_bytes, expected)
