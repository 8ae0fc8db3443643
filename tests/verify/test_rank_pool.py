"""The pool of ranks outlives what goes wrong in it."""

from __future__ import annotations

import os
import signal

import pytest

from tpresearch.config.world import World
from tpresearch.verify.ranks import RankError, Ranks


def die_on_rank_one(world: World) -> int:
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return world.rank


def rank(world: World) -> int:
    return world.rank


def test_a_rank_that_dies_is_said_and_later_calls_start_anew(ranks: Ranks) -> None:
    with pytest.raises(RankError, match="rank 1 of 2:\nits process died"):
        ranks.run(2, die_on_rank_one)
    assert ranks.run(2, rank) == [0, 1]
    for process, _ in ranks._workers:
        process.kill()
        process.join()
    assert ranks.run(2, rank) == [0, 1]
