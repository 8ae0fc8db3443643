"""A step with other rows per micro-batch, from recorded ones: every size of an op grows by the same amount per row.

And with one block more: what three blocks do at more rows follows from what they do at few, and two at both. A loss in
chunks of tokens has more of them at more rows, and each does what the one before it does.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from tpresearch.simulate.device_memory import BETWEEN, by_moment
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
        told = [_grow(a, a, b, rows) for a, b in zip(ours, like, strict=True)]
        repeated = _renumber(theirs[chunks], told, like) * times
        found.append((*told[: chunks.start], *repeated, *told[chunks.start :]))
    known = _loss_chunk_changes(few.changes, more.changes)
    if known is None:
        return None
    at_more, extra = known
    held = [
        a._replace(grown=_grown(a.grown, a.grown, b.grown, rows))
        for a, b in zip(few.changes, at_more, strict=True)
    ]
    return _trace(found, _with_chunks(held, range(len(held)), extra))


def with_block(two: Trace, three: Trace, two_more: Trace) -> Trace | None:
    """Three blocks at `MORE_ROWS` rows, from two and three blocks at `FEW_ROWS`, and two at `MORE_ROWS`; None if they run other ops.

    The block between the first and the last grows like the one before it.
    """
    found = []
    for shallow, deep, more in zip(two.recorded, three.recorded, two_more.recorded, strict=True):
        names = ([(op.phase, op.name, op.shape) for op in part] for part in (shallow, deep))
        places, chunks = _match_blocks(*names), _loss_chunks(shallow, more)
        if places is None or chunks is None:
            return None
        grown = _drop(more, chunks)
        like = [grown[at] for at in places]
        told = [_grow(op, shallow[at], grown[at], MORE_ROWS) for op, at in zip(deep, places, strict=True)]
        if chunk := more[chunks]:
            start = places.index(chunks.start - 1) + 1
            told[start:start] = _renumber(chunk, told, like)
        found.append(tuple(told))
    known, places = _loss_chunk_changes(two.changes, two_more.changes), _match_changes(two, three, two_more)
    if places is None or known is None:
        return None
    at_more, extra = known
    held = [
        change._replace(grown=_grown(change.grown, two.changes[at].grown, at_more[at].grown, MORE_ROWS))
        for change, at in zip(three.changes, places, strict=True)
    ]
    return _trace(found, _with_chunks(_free_in_backward(held, two, three, two_more), places, extra))


def _match_changes(two: Trace, three: Trace, two_more: Trace) -> list[int] | None:
    """`_match_blocks` for changes of memory. At moments that do not depend on rows, such as clipping, any change will do."""
    found: list[int] = []
    first = 0
    for moment in dict.fromkeys(one.moment for one in three.changes):
        ours, theirs, grown = (
            [one for one in trace.changes if one.moment == moment] for trace in (two, three, two_more)
        )
        places: Sequence[int] | None = range(len(ours))  # of the sums between moments: one per kind
        if ours and ours == grown:
            places = [0] * len(theirs)
        elif not moment.startswith(BETWEEN):
            places = _match_blocks(ours, theirs)
        if places is None:
            return None
        found += [first + at for at in places]
        first += len(ours)
    return found if len(found) == len(three.changes) else None


def _free_in_backward(held: Sequence[Change], two: Trace, three: Trace, two_more: Trace) -> list[Change]:
    """Free what the middle block keeps for additional rows between the backward of the last block and that of the first."""
    kept: Counter[tuple[str, str]] = Counter()
    for changes, sign in ((held, 1), (three.changes, -1), (two_more.changes, -1), (two.changes, 1)):
        for moment, kind, grown in changes:
            kept[moment, kind] += sign * grown
    moments = [*dict.fromkeys(one.moment for one in held)]
    forward_of, forward = {}, ""
    for before, moment in itertools.pairwise(moments):
        forward = moment if moment.endswith(" forward") else forward
        if moment.endswith(" backward ends"):
            forward_of[before] = forward
    return [one._replace(grown=one.grown - kept[forward_of.get(one.moment, ""), one.kind]) for one in held]


def _trace(parts: Sequence[tuple[Op, ...]], changes: Sequence[Change]) -> Trace:
    return Trace(tuple(parts[:-1]), parts[-1], by_moment(changes), tuple(changes))


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


def _with_chunks(
    held: Sequence[Change], places: Sequence[int], chunks: Mapping[int, Sequence[Change]]
) -> list[Change]:
    found: list[Change] = []
    for change, at in zip(held, places, strict=True):
        found += [change, *chunks.get(at, ())]
    return found


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


def _match_blocks(
    shallow: Sequence[tuple[Hashable, ...]], deep: Sequence[tuple[Hashable, ...]]
) -> list[int] | None:
    """For each item of a deeper step, the index of the matching one of the shallower: within each phase or moment (its first
    field), items of the additional block match those of the block before it."""
    found: list[int] = []
    for phase in dict.fromkeys(one[0] for one in deep):
        mine = [i for i, one in enumerate(shallow) if one[0] == phase]
        ours, theirs = [shallow[i] for i in mine], [one for one in deep if one[0] == phase]
        extra = _inserted(ours, theirs)
        if extra is None:
            return None
        before = 2 * extra.start - extra.stop
        if before < 0 or theirs[extra] != ours[before : extra.start]:
            return None
        found += mine[: extra.start] + mine[before:]
    return found if len(found) == len(deep) else None


def _grow(op: Op, few: Op, more: Op, rows: int) -> Op:
    """An op of `FEW_ROWS` rows at `rows` rows, growing as it, or one of a shallower step, does from `few` to `more`."""
    event = op.event
    if event and few.event and more.event:
        sizes = event.tensor_bytes, few.event.tensor_bytes, more.event.tensor_bytes
        event = replace(event, tensor_bytes=_grown(*sizes, rows))
    return op._replace(
        reads=_grow_touched(op.reads, few.reads, more.reads, rows),
        writes=_grow_touched(op.writes, few.writes, more.writes, rows),
        shape=tuple(_grown(*sizes, rows) for sizes in zip(op.shape, few.shape, more.shape, strict=True)),
        event=event,
    )


def _grow_touched(touched: Touched, few: Touched, more: Touched, rows: int) -> Touched:
    if len(touched) != len(few):  # one kernel over all parameters: as many as there are blocks
        return touched
    return tuple(
        (number, _grown(size, a, b, rows))
        for (number, size), (_, a), (_, b) in zip(touched, few, more, strict=True)
    )


def _grown(size: int, few: int, more: int, rows: int) -> int:
    return size + (rows - FEW_ROWS) * (more - few) // (MORE_ROWS - FEW_ROWS)
