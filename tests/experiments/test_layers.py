"""The four cases of experiments/layers: shards, what is sent by hand-counted bytes, and the same product."""

from __future__ import annotations

import pytest
from layers.measure import CASES, HIDDEN, ROWS, WIDTH, see

from tpresearch.verify.ranks import Ranks

A_WIDE, X = ROWS * HIDDEN * 4, ROWS * WIDTH * 4


def sends(count: int, kind: str, whole: int, size: int) -> str:
    rounds = 2 if kind == "all-reduce" else 1
    return f"{count} {kind} of {whole:,} B, sends {rounds * whole * (size - 1) // size:,} B"


@pytest.mark.parametrize("size", [2, 4])
def test_shards_sends_and_product(ranks: Ranks, size: int) -> None:
    column, row, both, sequence = (ranks.run(size, see, case) for case in CASES)
    assert {seen.apart for case in (column, row, both, sequence) for seen in case} == {0.0}
    for seen in column:
        assert seen.held == {"X": (ROWS, WIDTH), "B": (WIDTH, HIDDEN // size)}
        assert seen.sent["forward"] == sends(1, "all-gather", A_WIDE, size)
        assert seen.sent["backward"] == sends(1, "all-reduce", X, size)
    for seen in row:
        assert seen.held == {"X": (ROWS, WIDTH // size), "B": (WIDTH // size, HIDDEN)}
        assert seen.sent == {"forward": sends(1, "all-reduce", A_WIDE, size), "backward": "nothing"}
    for seen in both:
        assert seen.held == {"X": (ROWS, WIDTH), "B": (WIDTH, HIDDEN // size), "C": (HIDDEN // size, WIDTH)}
        assert seen.sent["forward"] == seen.sent["backward"] == sends(1, "all-reduce", X, size)
    for seen in sequence:
        assert seen.held == {
            "X": (ROWS // size, WIDTH),
            "B": (WIDTH, HIDDEN // size),
            "C": (HIDDEN // size, WIDTH),
        }
        halves = [sends(1, "all-gather", X, size), sends(1, "reduce-scatter", X, size)]
        for phase in ("forward", "backward"):  # the same bytes as `both`, in two halves
            assert sorted(seen.sent[phase].split(" + ")) == halves
