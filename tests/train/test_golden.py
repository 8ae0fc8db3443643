"""The first ten steps of the default recipe on a small model are those of tests/golden: one file for all plans.

What a change of the arithmetic moves shows here, also where every plan moves alike. Where it is meant to, write the
file again:

    python -m pytest tests/train/test_golden.py --write-golden
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from support.checkpointed import go
from support.composed import config, corpus

from tpresearch.config import Config
from tpresearch.config.world import World
from tpresearch.verify.ranks import Ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "llama2_debug.json"
STEPS = 10
TOLERANCE = 1e-10
PLANS = {"none": 1, "fsdp_tp": 4}


def first_steps(world: World, cfg: Config) -> dict[str, list[float]] | None:
    went = go(world, cfg, STEPS)
    return {"loss": went.losses, "grad_norm": went.norms} if went else None


def key() -> str:
    """What else the numbers depend on: the rows. Torch 2.11 and 2.13 compute the same to 2e-16."""
    return f"corpus {hashlib.sha256(corpus().train.tobytes()).hexdigest()[:16]}"


@pytest.mark.parametrize("plan", PLANS)
def test_ten_steps_are_the_golden_ones(ranks: Ranks, plan: str, request: pytest.FixtureRequest) -> None:
    cfg = config("model=llama2_debug", "train.dtype=float64", f"parallel={plan}")
    ours = ranks.run(PLANS[plan], first_steps, cfg)[0]
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if plan == "none" and request.config.getoption("--write-golden"):
        golden[key()] = ours
        GOLDEN.write_text(json.dumps(golden, indent=2) + "\n")
    assert key() in golden, "no golden numbers for these rows: --write-golden"
    for name, values in golden[key()].items():
        assert ours[name] == pytest.approx(values, rel=TOLERANCE, abs=0), name
