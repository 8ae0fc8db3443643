"""A step with other rows per micro-batch, from two recorded ones: every size of an op grows by the same amount per row."""

from __future__ import annotations

from dataclasses import replace

from tpresearch.simulate.trace import Op, Touched, Trace

FEW, MORE = 2, 4
"""Rows per micro-batch that are recorded. (A single row is a case of its own: no dim has to be gathered beside it.)"""


def with_rows(few: Trace, more: Trace, rows: int) -> Trace | None:
    """The step at `rows` rows per micro-batch, from those at `FEW` and `MORE`; None where these two run other ops."""
    parts = [*zip((*few.micro_batches, few.end), (*more.micro_batches, more.end), strict=True)]
    if any([op.name for op in a] != [op.name for op in b] for a, b in parts):
        return None
    *batches, end = (tuple(_op(a, b, rows) for a, b in zip(*pair, strict=True)) for pair in parts)
    memory = {name: _line(few.memory.get(name, 0), size, rows) for name, size in more.memory.items()}
    return Trace(tuple(batches), end, memory)


def _op(few: Op, more: Op, rows: int) -> Op:
    event = few.event
    if event and more.event:
        event = replace(event, tensor_bytes=_line(event.tensor_bytes, more.event.tensor_bytes, rows))
    shape = tuple(_line(a, b, rows) for a, b in zip(few.shape, more.shape, strict=True))
    return few._replace(
        reads=_touched(few.reads, more.reads, rows),
        writes=_touched(few.writes, more.writes, rows),
        shape=shape,
        event=event,
    )


def _touched(few: Touched, more: Touched, rows: int) -> Touched:
    return tuple((number, _line(a, b, rows)) for (number, a), (_, b) in zip(few, more, strict=True))


def _line(few: int, more: int, rows: int) -> int:
    return few + (rows - FEW) * (more - few) // (MORE - FEW)
