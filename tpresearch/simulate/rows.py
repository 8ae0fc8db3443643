"""A step with other rows per micro-batch, from recorded ones: every size of an op grows by the same amount per row.

And with one block more: what three blocks do at more rows follows from what they do at few, and two at both.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def with_block(two: Trace, three: Trace, two_more: Trace) -> Trace | None:
    """Three blocks at `MORE` rows, from two and three blocks at `FEW`, and two at `MORE`; None where they run other ops.

    The block between the first and the last grows as the one before it does.
    """
    found = []
    parts = zip(
        (*two.micro_batches, two.end),
        (*three.micro_batches, three.end),
        (*two_more.micro_batches, two_more.end),
        strict=True,
    )
    for shallow, deep, grown in parts:
        places = _places(shallow, deep)
        if places is None or [op.name for op in shallow] != [op.name for op in grown]:
            return None
        found.append(tuple(_grown(op, shallow[at], grown[at]) for op, at in zip(deep, places, strict=True)))
    *batches, end = found
    memory = {}
    for name, size in three.memory.items():
        block = size - two.memory.get(name, 0)
        grows = MORE // FEW if name.endswith("/activations") else 1
        memory[name] = two_more.memory.get(name, 0) + block * grows
    return Trace(tuple(batches), end, memory)


def _places(shallow: Sequence[Op], deep: Sequence[Op]) -> list[int] | None:
    """Of each op of a deeper part, the op of the shallower that does the same: by phase, the ops of the block that is more
    are those of the block before it."""
    found: list[int] = []
    for phase in dict.fromkeys(op.phase for op in deep):
        mine = [i for i, op in enumerate(shallow) if op.phase == phase]
        names = [(op.name, op.shape) for op in deep if op.phase == phase]
        ours = [(shallow[i].name, shallow[i].shape) for i in mine]
        more = len(names) - len(ours)
        same = next((i for i, (a, b) in enumerate(zip(names, ours, strict=False)) if a != b), len(ours))
        if more < 0 or same < more or names[same:] != ours[same - more :]:
            return None
        found += mine[:same] + mine[same - more :]
    return found if len(found) == len(deep) else None


def _grown(op: Op, few: Op, more: Op) -> Op:
    """The op at `MORE` rows, growing as one of a shallower step does from `few` to `more`."""
    event = op.event
    if event and few.event and more.event:
        event = replace(
            event, tensor_bytes=event.tensor_bytes + more.event.tensor_bytes - few.event.tensor_bytes
        )
    return op._replace(
        reads=_more(op.reads, few.reads, more.reads),
        writes=_more(op.writes, few.writes, more.writes),
        shape=more.shape,
        event=event,
    )


def _more(touched: Touched, few: Touched, more: Touched) -> Touched:
    if len(touched) != len(few):  # one kernel over all parameters: as many as there are blocks
        return touched
    return tuple(
        (number, size + b - a) for (number, size), (_, a), (_, b) in zip(touched, few, more, strict=True)
    )


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
