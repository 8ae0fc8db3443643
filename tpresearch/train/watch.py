"""The observers of every run: time per phase, peak memory, and one step under both ledgers."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.ledger.communication import CommunicationLedger
from tpresearch.ledger.entries import PHASES, Expected, StepLedger, entries_of
from tpresearch.ledger.memory import MemoryLedger
from tpresearch.parallel.device import Device
from tpresearch.train.observe import Metrics, Observer
from tpresearch.train.speed import Speed
from tpresearch.train.state import TrainState


class Timing(Observer):
    """Seconds per step and per phase. On CUDA between events of the stream, without waiting for the device.

    Phases exclude what lies between them and include collectives that they wait for. The time of data is the
    host's: a GPU may still be at the previous step. Evaluation and pauses are excluded from the step time.

    Args:
        left_out: steps of this process, counted from 1, that are in no row's times: those that a profiler slows down. A
            row of such steps alone has none.
    """

    def __init__(self, device: torch.device, speed: Speed, left_out: range) -> None:
        self._on_cuda, self._speed, self._left_out = device.type == "cuda", speed, left_out
        self._taken, self._left_at = 0, math.inf
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._free: list[torch.cuda.Event] = []
        self._begin_row()

    def _begin_row(self) -> None:
        """A row's time begins when its first batch is read, after the last row was logged."""
        self._seconds = dict.fromkeys((*PHASES, "data", "evaluation", "pause"), 0.0)
        self._steps, self._paused, self._began = 0, False, time.perf_counter()

    def start(self, state: TrainState) -> None:
        self._paused = True

    @contextmanager
    def step(self, state: TrainState) -> Iterator[None]:
        yield
        self._taken += 1
        if self._left_at < math.inf:  # here the others have ended the step too, and written what they write
            self._seconds["pause"] += time.perf_counter() - self._left_at
            self._left_at = math.inf
        else:
            self._steps += 1

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if self._paused and name == "data":
            self._begin_row()
        if name == "data" and self._taken + 1 in self._left_out:
            if self._on_cuda:
                torch.cuda.synchronize()  # the steps before it end in their own time
            self._left_at = time.perf_counter()
        if self._left_at < math.inf:
            yield
            return
        if self._on_cuda and name in PHASES:
            start, end = self._event(), self._event()
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        began = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - began

    def _event(self) -> torch.cuda.Event:
        """An event whose time has been read, or a new one: with rare logging there would be tens of thousands."""
        if not self._free:
            self._read(wait=False)
        return self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)

    def _read(self, wait: bool) -> None:
        """Add up the phases that the device is done with; with `wait`, all."""
        while self._events and (wait or self._events[0][2].query()):
            name, start, end = self._events.pop(0)
            end.synchronize()
            self._seconds[name] += start.elapsed_time(end) / 1000
            self._free += [start, end]

    def metrics(self) -> Metrics:
        """On CUDA this waits for the recorded events."""
        between = self._seconds["evaluation"] + self._seconds["pause"]
        elapsed = time.perf_counter() - self._began - between
        self._read(wait=True)
        self._paused = True
        if not self._steps:
            return {}
        found: Metrics = {f"time/{name}_s": self._seconds[name] / self._steps for name in ("data", *PHASES)}
        return {**self._speed.metrics(elapsed / self._steps), **found}


class PeakMemory(Observer):
    """Peak memory of this rank: of the CUDA allocator, or on a CPU the process's resident memory."""

    def __init__(self, device: Device) -> None:
        self._device = device

    def metrics(self) -> Metrics:
        if self._device.type == "cuda":
            return {
                "memory/peak_bytes": torch.cuda.max_memory_allocated(self._device.torch),
                "memory/reserved_bytes": torch.cuda.max_memory_reserved(self._device.torch),
                "memory/alloc_retries": torch.cuda.memory_stats(self._device.torch)["num_alloc_retries"],
            }
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"memory/peak_bytes": peak, "memory/reserved_bytes": None, "memory/alloc_retries": None}


class CountedStep(Observer):
    """Runs one early step under both ledgers: the second of this process, since the first may send more than later
    ones.

    Args:
        last_step: of the run; counted if there is no second step.
        compiled: whether the model's blocks are compiled: only the allocator sees their memory, so it is not counted.
        report: called with the result.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        expected: Expected,
        last_step: int,
        compiled: bool = False,
        report: Callable[[StepLedger], None] | None = None,
    ) -> None:
        self._mesh, self._expected, self._compiled, self._report = mesh, expected, compiled, report
        self._last, self._counts_at, self._all_used = last_step, -1, True
        self._sent: CommunicationLedger | None = None
        self._held: MemoryLedger | None = None
        self.counted: StepLedger | None = None

    def start(self, state: TrainState) -> None:
        self._counts_at = min(state.step + 1, self._last)

    @contextmanager
    def step(self, state: TrainState) -> Iterator[None]:
        if state.step != self._counts_at:
            yield
            return
        sent = self._sent = CommunicationLedger(self._mesh)
        given = state.model, state.optimizer, state.remainders
        held = self._held = None if self._compiled else MemoryLedger(*given)
        with sent, held or nullcontext():
            yield
        self._sent = self._held = None
        use, peak = (held.held(), held.allocator_peak_bytes) if held else ([], None)
        expected = self._expected if self._all_used else self._expected.for_unused_parameters()
        self.counted = StepLedger(entries_of(sent.events), use, peak, expected)
        if self._report:
            self._report(self.counted)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with (
            self._sent.phase(name) if self._sent else nullcontext(),
            self._held.phase(name) if self._held else nullcontext(),
        ):
            yield

    def gradients(self, state: TrainState) -> None:
        if self._sent:
            wanted = (p for p in state.trained_parameters().values() if p.requires_grad)
            self._all_used = all(parameter.grad is not None for parameter in wanted)
        if self._held:
            self._held.note_gradients()

    def metrics(self) -> Metrics:
        return {"comm/bytes_per_step": self.counted.sent_bytes if self.counted else None}
