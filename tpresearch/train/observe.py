"""Observers: they watch a run that does not name them. Timing, ledgers, memory and mistakes are observers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

from tpresearch.train.state import TrainState

Metrics = dict[str, float | int | None]


class Observer:
    """Watches a run through the events that it overrides; the others do nothing."""

    def start(self, state: TrainState) -> None:
        """The model has its weights, and no step of this process has been taken."""

    def step(self, state: TrainState) -> AbstractContextManager[object]:
        """Entered around one optimizer step, forward to update."""
        return nullcontext()

    def phase(self, name: str) -> AbstractContextManager[object]:
        """Entered around a part of a step (one of `ledger.entries.PHASES`), or around what is between two: `data`,
        `evaluation`, `pause`."""
        return nullcontext()

    def gradients(self, state: TrainState) -> None:
        """The gradients of the global batch are complete on each rank's shards, and not yet clipped."""

    def metrics(self) -> Metrics:
        """Its metrics for a logged row, over the time since the last one."""
        return {}


class Observers(Observer):
    """Calls several observers, in their order."""

    def __init__(self, observers: Sequence[Observer] = ()) -> None:
        self._all = list(observers)

    def start(self, state: TrainState) -> None:
        for observer in self._all:
            observer.start(state)

    def step(self, state: TrainState) -> AbstractContextManager[object]:
        return _all_of(observer.step(state) for observer in self._all)

    def phase(self, name: str) -> AbstractContextManager[object]:
        return _all_of(observer.phase(name) for observer in self._all)

    def gradients(self, state: TrainState) -> None:
        for observer in self._all:
            observer.gradients(state)

    def metrics(self) -> Metrics:
        return {name: value for observer in self._all for name, value in observer.metrics().items()}


@contextmanager
def _all_of(contexts: Iterable[AbstractContextManager[object]]) -> Iterator[None]:
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield
