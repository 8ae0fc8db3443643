"""The commands that are proposed after a run: each other plan as its name says, judged before it is shown, and once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tpresearch.config.errors import ConfigError
from tpresearch.launch.command import Command
from tpresearch.track.next_steps import NextSteps

REFUSED = ConfigError("parallel", "fsdp_tp", "it is not for this model", "another")


@pytest.mark.parametrize(
    ("ranks", "refused", "other"), [(2, "", "fsdp"), (4, "", "fsdp_tp"), (4, "fsdp_tp", "fsdp")]
)
def test_the_plan_to_see_next_is_all_that_its_name_says(
    tmp_path: Path, ranks: int, refused: str, other: str
) -> None:
    """Two axes take four ranks; and what is refused is not proposed."""
    steps = NextSteps(
        Command(("parallel=tp",), ranks=ranks),
        lambda command: REFUSED if f"parallel={refused}" in command.arguments else None,
    )
    first, _ = steps.after({"parallel": "tp", "world_size": ranks}, tmp_path)[0]
    assert first.endswith(f" parallel={other}")


def test_the_plan_to_see_next_is_started_on_the_same_hosts(tmp_path: Path) -> None:
    started = Command(("parallel=tp",), ranks=2, hosts=2, options=("--nnodes=2", "--node-rank=0"))
    first, _ = NextSteps(started, lambda _: None).after({"parallel": "tp", "world_size": 4}, tmp_path)[0]
    assert "torchrun --nnodes=2 --node-rank=0 --nproc-per-node=2 " in first


@pytest.mark.parametrize(
    ("typed", "world", "judged"),
    [
        (["parallel=tp"], 2, ["parallel=fsdp", "-m parallel=none world_size=2"]),
        (["parallel=none", "hydra.run.dir=r", "logger.name=mine"], 1, ["parallel=fsdp"]),
        # On other ranks, or on another mesh, the plan that ran may be refused.
        (["parallel=tp"], 1, ["parallel=fsdp", "-m parallel=none,tp world_size=2"]),
        (["parallel=tp", "mesh.tp=2"], 2, ["parallel=fsdp", "-m parallel=none,tp world_size=2"]),
    ],
)
def test_what_ran_or_was_judged_just_now_is_not_judged_again(
    tmp_path: Path, typed: list[str], world: int, judged: list[str]
) -> None:
    asked: list[str] = []
    command = Command(tuple(typed), ranks=world)
    steps = NextSteps(command, lambda judged: asked.append(" ".join(judged.arguments)))
    plan = typed[0].partition("=")[2]
    (_, sweep, *_) = steps.after({"parallel": plan, "world_size": world}, tmp_path)
    assert asked == judged
    plans = ",".join(dict.fromkeys(["none", plan, "fsdp"]))
    assert sweep[0].endswith(f" -m parallel={plans} world_size=2")
