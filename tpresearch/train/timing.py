"""Where a step's time goes: seconds in each phase, on the device's own clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PHASES = ("forward", "loss", "backward", "clip", "optimizer")


class PhaseTimes:
    """Adds up the time of each phase. On CUDA between events of the stream, without waiting for the device.

    Phases leave out what lies between them; collectives that a phase waits for are in it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def mark(self, phase: str) -> Iterator[None]:
        if self._on_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((phase, start, end))
            return
        began = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - began

    def seconds(self) -> dict[str, float]:
        """The sums by phase. On CUDA this waits for what has been marked."""
        for phase, start, end in self._events:
            end.synchronize()
            self._seconds[phase] += start.elapsed_time(end) / 1000
        self._events.clear()
        return dict(self._seconds)
