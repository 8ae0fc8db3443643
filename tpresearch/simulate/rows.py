"""A step with other rows per micro-batch, from two recorded ones: every size of an op grows by the same amount per row."""

from __future__ import annotations

from dataclasses import replace

from tpresearch.simulate.trace import Op, Touched, Trace


def with_rows(one: Trace, two: Trace, rows: int) -> Trace | None:
    """The step at `rows` rows per micro-batch, from those at one row and at two; None where the two run other ops."""
    if rows == 1:
        return one
    parts = [*zip((*one.micro_batches, one.end), (*two.micro_batches, two.end), strict=True)]
    if any([op.name for op in a] != [op.name for op in b] for a, b in parts):
        return None
    *batches, end = (tuple(_op(a, b, rows) for a, b in zip(*pair, strict=True)) for pair in parts)
    memory = {name: _line(one.memory.get(name, 0), size, rows) for name, size in two.memory.items()}
    return Trace(tuple(batches), end, memory)


def _op(one: Op, two: Op, rows: int) -> Op:
    event = one.event
    if event and two.event:
        event = replace(event, tensor_bytes=_line(event.tensor_bytes, two.event.tensor_bytes, rows))
    shape = tuple(_line(a, b, rows) for a, b in zip(one.shape, two.shape, strict=True))
    return one._replace(
        reads=_touched(one.reads, two.reads, rows),
        writes=_touched(one.writes, two.writes, rows),
        shape=shape,
        event=event,
    )


def _touched(one: Touched, two: Touched, rows: int) -> Touched:
    return tuple((number, _line(a, b, rows)) for (number, a), (_, b) in zip(one, two, strict=True))


def _line(one: int, two: int, rows: int) -> int:
    return one + (rows - 1) * (two - one)
