"""A short part of experiments/faults: runs that die at named points, are damaged on disk, and end as if nothing had been."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.damages import DAMAGES, damaged
from faults.exam import KINDS, POINTS, Reference, drawn, reference, survive
from faults.job import IN_SAVES
from support.marks import exhaustive

SEED = 0
EVERY_DAY = (23, 79)
"""No space left while a rank writes; all killed while they load."""
DAMAGES_OF_EVERY_DAY = ("all would run code when read",)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return reference(tmp_path_factory.mktemp("faults") / "undisturbed")


@pytest.mark.parametrize("number", [n if n in EVERY_DAY else exhaustive(n) for n in range(160)])
def test_a_run_survives(undisturbed: Reference, tmp_path: Path, number: int) -> None:
    survived = survive(number, SEED, tmp_path / "run", undisturbed)
    assert survived.problems == [], survived.history


@pytest.mark.parametrize(
    "damage", [d.what if d.what in DAMAGES_OF_EVERY_DAY else exhaustive(d.what) for d in DAMAGES]
)
def test_damage_costs_no_more_than_what_it_hit(undisturbed: Reference, tmp_path: Path, damage: str) -> None:
    number = [d.what for d in DAMAGES].index(damage)
    survived = damaged(number, tmp_path / "run", undisturbed)
    assert survived.problems == [], survived.history


def test_every_point_is_broken_in_every_way() -> None:
    drawn_faults = [fault for n in range(160) for fault in drawn(n, SEED)[1] if fault]
    assert {fault.point for fault in drawn_faults} == set(POINTS)
    assert {(f.point, f.kind) for f in drawn_faults} >= {(p, k) for p in IN_SAVES for k in KINDS}
    assert sum(len([f for f in drawn(n, SEED)[1] if f]) > 1 for n in range(160)) >= 160 // 4
