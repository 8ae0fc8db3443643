"""Verify catches wrong plans: each mutant of experiments/mutants by a quantity that is named there."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from mutants.catalogue import MUTANTS, Mutant, run
from support.composed import config, corpus, in_two_parts
from support.marks import exhaustive

from tpresearch.config import Config
from tpresearch.config.schema import Dtype
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.reference import reference
from tpresearch.verify.trace import RunTrace, compare, out_of_tolerance

STEPS = 2
SETTINGS = ("optimizer=sgd", "train.dtype=float64", "train.clip_grad_norm=0.2", "train.eval_rows=11")


def cases() -> Iterator[Any]:
    """Each mutant on both models; every day the first that a quantity catches under a plan, on the smaller that it has."""
    caught: set[tuple[str, str]] = set()
    for mutant in MUTANTS:
        first, *others = mutant.models
        way = mutant.caught_by, mutant.plan
        yield exhaustive(mutant, first) if way in caught else pytest.param(mutant, first)
        yield from (exhaustive(mutant, model) for model in others)
        caught.add(way)


def wrong(mutant: Mutant, model: str) -> Config:
    return in_two_parts(config(f"model={model}", f"parallel={mutant.plan}", *SETTINGS), mutant.ranks)


@cache
def right(model: str) -> RunTrace:
    return reference(config(f"model={model}", "parallel=none", *SETTINGS), corpus(), STEPS)


@pytest.mark.parametrize(
    ("mutant", "model"), list(cases()), ids=lambda v: v if isinstance(v, str) else v.name
)
def test_a_wrong_plan_is_caught(ranks: Ranks, mutant: Mutant, model: str) -> None:
    ours = ranks.run(mutant.ranks, run, mutant.name, wrong(mutant, model), corpus(), STEPS)[0]
    assert isinstance(ours, str) == (mutant.caught_by == "did not run"), ours
    if isinstance(ours, str):
        return
    found = compare(ours, right(model))
    assert mutant.caught_by in out_of_tolerance(found, Dtype.float64), found
    assert found[mutant.caught_by].error > 1e-9, "too near to rounding to be this fault"


def test_there_are_enough_for_both_models() -> None:
    for model in ("toy_mlp", "llama2_debug"):
        assert sum(model in mutant.models for mutant in MUTANTS) >= 20
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
