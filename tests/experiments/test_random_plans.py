"""Random models under random rules train as one process does, or are refused: some of experiments/random_plans, and what it would find."""

from __future__ import annotations

import pytest
from random_plans.measure import net, outcome, trained
from support.marks import exhaustive

from tpresearch.verify.ranks import Ranks

FINE = {"right", "refused", "refused in the first step", "noted"}


@pytest.mark.parametrize("first", [0, *(exhaustive(first) for first in range(1000, 1200, 20))])
def test_random_models_are_refused_or_right(ranks: Ranks, first: int) -> None:
    found = {seed: outcome(net(seed), ranks) for seed in range(first, first + (20 if first else 8))}
    assert {seed: each for seed, each in found.items() if each[0] not in FINE} == {}
    if not first:
        assert {what for what, _ in found.values()} >= {"right", "refused"}


def test_a_wrong_model_is_told_where_it_is_not_refused(ranks: Ranks) -> None:
    wrong = next(
        found
        for seed in range(1000)
        if "(3, -1, 4)" in (found := net(seed)).source and found.parallel == "tp"
    )
    assert outcome(wrong, ranks)[0] == "refused"
    assert "loss, grad norm, gradients" in trained(wrong, ranks, checked=False)
