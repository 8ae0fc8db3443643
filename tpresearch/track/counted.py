"""One early step under both ledgers: what it sends and what it holds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from tpresearch.track.ledger import Entry, Ledger
from tpresearch.track.memory import MemoryLedger


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


def write_ledger(folder: Path, counted: Counted, expected: Expected) -> None:
    """ledger.json: what rank 0 sent and held in one step, beside what the formulas say (null where there are none)."""
    held = counted.held.held()
    both = {
        "measured": [asdict(entry) for entry in counted.sent.entries()],
        "expected": None if expected.sent is None else [asdict(entry) for entry in expected.sent],
        "memory": {
            "measured": [asdict(kind) for kind in held],
            "expected": expected.held,
            "peak_bytes": sum(kind.at_peak_bytes for kind in held),
            "allocator_peak_bytes": counted.held.allocator_peak_bytes,
        },
    }
    (folder / "ledger.json").write_text(json.dumps(both, indent=2) + "\n")
