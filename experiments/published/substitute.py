"""Ops of a recorded step in whose place others are put."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from tpresearch.simulate.prices import COPIES
from tpresearch.simulate.trace import Op, Trace


def each_part(trace: Trace, change: Callable[[Sequence[Op]], Iterable[Op]]) -> Trace:
    """The step with each of its micro-batches changed."""
    return Trace(tuple(tuple(change(part)) for part in trace.micro_batches), trace.end, trace.memory)


def each_op(trace: Trace, change: Callable[[Op], Iterable[Op]]) -> Trace:
    """The step with other ops, or none, in the place of each op of a micro-batch."""
    return each_part(trace, lambda part: (new for op in part for new in change(op)))


def without_copies(part: Sequence[Op]) -> list[Op]:
    """With each of FSDP's copies as a mark of what waits for its storages, moving nothing."""
    return [
        op._replace(reads=_empty(op.reads), writes=_empty(op.writes)) if op.name in COPIES else op
        for op in part
    ]


def _empty(touched: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
    return tuple((number, 0) for number, _ in touched)
