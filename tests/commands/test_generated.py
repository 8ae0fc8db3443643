"""Configs that nobody wrote: each works, or ends in one line, exit code 2, with nothing left and a command that is not refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from support.commands import Done, environment, execute_warm
from support.generated import MOST_S, Case, case, fault, refused, to_try
from support.marks import exhaustive
from support.trainings import TRAIN

from tpresearch.verify.ranks import Ranks

pytestmark = pytest.mark.cli

EVERY_DAY, FEW, BLOCK, BLOCKS = 4, 24, 200, 10
MENDED = (1066, 1090, 1091, 1170, 1180, 1523, 1594, 2068)
"""Cases whose proposals were refused once (a prefix, an empty name, a flag, a folder of configs, an interpolation of Hydra's
own), which ended in Hydra's traceback (a list with null), or were told of with a warning of Hydra's (a folder that is not there)."""
DEEP = 1090
"""Of 96 blocks; what is proposed instead of its empty name, test_proposals.py has every day."""
PLACE = {
    "RANK": "0",
    "LOCAL_RANK": "0",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "1",
    "TORCHELASTIC_RUN_ID": "none",
}


def started(ranks: Ranks, folder: Path, case: Case) -> Done:
    """The command as the first of its ranks, none of which ever meets another."""
    size = {"WORLD_SIZE": str(case.ranks), "LOCAL_WORLD_SIZE": str(case.ranks)}
    env = environment(folder / "home", HF_HUB_OFFLINE="1", **(PLACE | size if case.ranks > 1 else {}))
    for place in ("home", "around/cwd"):
        (folder / place).mkdir(parents=True)
    return execute_warm(ranks, None, [str(TRAIN), *case.words], folder / "around" / "cwd", env)


def left(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name not in ("home", "around", "cwd")]


@pytest.mark.parametrize(
    ("first", "count"),
    [
        (0, EVERY_DAY),
        *((n, 1) if n != DEEP else exhaustive(n, 1) for n in MENDED),
        exhaustive(EVERY_DAY, FEW - EVERY_DAY),
        *(exhaustive(1000 + nth * BLOCK, BLOCK) for nth in range(BLOCKS)),
    ],
)
def test_a_generated_config_works_or_is_refused_in_one_line(
    ranks: Ranks, tmp_path: Path, first: int, count: int
) -> None:
    faults: dict[int, str] = {}
    for number in range(first, first + count):
        made, folder = case(number), tmp_path / str(number)
        done = started(ranks, folder, made)
        if done.cpu_seconds > MOST_S:  # which a busy machine adds to: the lesser of two counts
            again = started(ranks, tmp_path / f"{number}-again", made)
            done = dataclasses.replace(done, cpu_seconds=min(done.cpu_seconds, again.cpu_seconds))
        found = fault(made, done, left(folder))
        if found is None and done.code == 2 and (proposed := to_try(done)):
            objection = refused(started(ranks, tmp_path / f"{number}-try", proposed))
            found = objection and f"{done.err} proposes what is refused: {objection}"
        if found:
            faults[number] = f"{' '.join(made.words)}: {found}"
    assert not faults, "\n".join(f"{number}: {found}" for number, found in faults.items())


def test_the_generator_reaches_what_it_should() -> None:
    """Plans that work and that do not, starts, and trainings; every part of the schema, of a model and of a rule."""
    made = [case(number) for number in range(3000)]
    assert 100 < sum(each.trains for each in made) < 300
    assert 300 < sum("plan_only=true" not in each.words and not each.trains for each in made) < 900
    words = "\n".join(word for each in made for word in each.words)
    for key in (
        "data.path=",
        "optimizer.betas=",
        "model.plans.sp.",
        "_target_=",
        "units=",
        "mesh.tp=",
        "hydra.",
        "~train.",
    ):
        assert words.count(key) > 10, key
    assert case(17) == case(17)
