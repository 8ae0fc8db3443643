"""A step with other rows per micro-batch, from recorded ones: every size of an op grows by the same amount per row.

A loss in chunks of tokens has more of them at more rows, and each does what the one before it does.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TypeVar

from tpresearch.simulate.device_memory import by_moment
from tpresearch.simulate.trace import Change, Op, Touched, Trace

Item = TypeVar("Item")

FEW_ROWS, MORE_ROWS = 2, 4
"""Rows per micro-batch that are recorded. (A single row is a case of its own: no dim has to be gathered beside it.)"""


def with_rows(few: Trace, more: Trace, rows: int) -> Trace | None:
    """The step at `rows` rows per micro-batch, from those at `FEW_ROWS` and `MORE_ROWS`; None if these two differ in their ops.

    A loss in chunks has to have chunks as long at all three.
    """
    found = []
    times, left = divmod(rows - FEW_ROWS, MORE_ROWS - FEW_ROWS)
    for ours, theirs in zip(few.recorded, more.recorded, strict=True):
        chunks = _loss_chunks(ours, theirs)
        if chunks is None or (theirs[chunks] and left):
            return None
        like = _drop(theirs, chunks)
        told = [_grow(a, b, rows) for a, b in zip(ours, like, strict=True)]
        repeated = _renumber(theirs[chunks], told, like) * times
        found.append((*told[: chunks.start], *repeated, *told[chunks.start :]))
    known = _loss_chunk_changes(few.changes, more.changes)
    if known is None:
        return None
    at_more, extra = known
    held = [
        a._replace(grown=_grown(a.grown, b.grown, rows)) for a, b in zip(few.changes, at_more, strict=True)
    ]
    changes = [part for at, change in enumerate(held) for part in (change, *extra.get(at, ()))]
    return Trace(tuple(found[:-1]), found[-1], by_moment(changes), tuple(changes))


def _loss_chunks(few: Sequence[Op], more: Sequence[Op]) -> slice | None:
    """Where a part has more ops at `MORE_ROWS` rows, chunks of the loss; None if it differs by others."""
    found = _inserted([(op.phase, op.name) for op in few], [(op.phase, op.name) for op in more])
    return None if found is None or any(op.phase != "loss" for op in more[found]) else found


def _loss_chunk_changes(
    few: Sequence[Change], more: Sequence[Change]
) -> tuple[list[Change], dict[int, Sequence[Change]]] | None:
    """The same of what is held: what is held at `MORE_ROWS` rows without chunks, and by the change at `FEW_ROWS` rows that they come
    after, the chunks. Each of them leaves what it found, so that one tells of all."""
    like: list[Change] = []
    chunks: dict[int, Sequence[Change]] = {}
    for moment in dict.fromkeys(one.moment for one in few):
        ours, theirs = ([one for one in held if one.moment == moment] for held in (few, more))
        extra = _inserted(*([(one.kind, one.grown > 0) for one in held] for held in (ours, theirs)))
        if extra is None:
            return None
        if chunk := theirs[extra]:
            if not moment.endswith(" loss") or sum(one.grown for one in chunk) != 0:
                return None
            chunks[len(like) + extra.start - 1] = chunk
        like += _drop(theirs, extra)
    return (like, chunks) if len(like) + sum(map(len, chunks.values())) == len(more) else None


def _inserted(short: Sequence[Hashable], long: Sequence[Hashable]) -> slice | None:
    """The slice that was inserted into a sequence to make the other; None if it is not a single slice."""
    extra = len(long) - len(short)
    same = next((i for i, (a, b) in enumerate(zip(short, long, strict=False)) if a != b), len(short))
    return None if extra < 0 or long[same + extra :] != short[same:] else slice(same, same + extra)


def _drop(every: Sequence[Item], stretch: slice) -> list[Item]:
    return [*every[: stretch.start], *every[stretch.stop :]]


def _renumber(ops: Sequence[Op], part: Sequence[Op], like: Sequence[Op]) -> tuple[Op, ...]:
    """Ops with the storages of a part that they are put into; those that are theirs alone have negative numbers.

    Args:
        like: of each op of the part, the one that does the same where these ops come from.
    """
    numbers = {
        theirs: ours
        for op, other in zip(part, like, strict=True)
        for mine, its in ((op.reads, other.reads), (op.writes, other.writes))
        for (ours, _), (theirs, _) in zip(mine, its, strict=False)
    }

    def touched(given: Touched) -> Touched:
        return tuple((numbers.get(number, min(number, -1 - number)), size) for number, size in given)

    return tuple(op._replace(reads=touched(op.reads), writes=touched(op.writes)) for op in ops)


def _grow(few: Op, more: Op, rows: int) -> Op:
    """An op at `rows` rows."""
    event = few.event
    if event and more.event:
        event = replace(event, tensor_bytes=_grown(event.tensor_bytes, more.event.tensor_bytes, rows))
    return few._replace(
        reads=_grow_touched(few.reads, more.reads, rows),
        writes=_grow_touched(few.writes, more.writes, rows),
        shape=tuple(_grown(a, b, rows) for a, b in zip(few.shape, more.shape, strict=True)),
        event=event,
    )


def _grow_touched(few: Touched, more: Touched, rows: int) -> Touched:
    return tuple((number, _grown(a, b, rows)) for (number, a), (_, b) in zip(few, more, strict=True))


def _grown(few: int, more: int, rows: int) -> int:
    return few + (rows - FEW_ROWS) * (more - few) // (MORE_ROWS - FEW_ROWS)
