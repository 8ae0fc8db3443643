"""How the sizes of the mesh follow from the plan and the number of ranks; commands/test_refused_trainings.py has what is refused."""

from __future__ import annotations

import pytest
from support.composed import config

from tpresearch.config.axes import MeshSizes
from tpresearch.config.errors import ConfigError
from tpresearch.config.mesh import ShardedCount, check_divisible, warning_of_unused_axes
from tpresearch.config.validate import (
    planned_world,
    ranks_needed,
    total_steps,
    validate,
    with_batch_that_fits,
)

COUNTS = {"n_heads": 8, "ffn_dim": 24}
OTHERS = {"mesh.dp_replicate": None, "mesh.dp_shard": None}


def sizes(*overrides: str, world: int, hosts: int = 1) -> dict[str, int]:
    return validate(config(*overrides, "train.global_batch_size=48"), world, hosts).nontrivial()


@pytest.mark.parametrize(
    ("plan", "world", "hosts", "expected"),
    [
        ("none", 1, 1, {}),
        ("ddp", 3, 1, {"dp_replicate": 3}),
        ("tp", 4, 1, {"tp": 4}),
        ("sp", 8, 1, {"tp": 8}),
        ("fsdp", 8, 1, {"dp_shard": 8}),
        ("hsdp", 4, 1, {"dp_replicate": 2, "dp_shard": 2}),
        ("hsdp", 16, 2, {"dp_replicate": 2, "dp_shard": 8}),
        ("fsdp_tp", 1, 1, {}),
        ("fsdp_tp", 2, 1, {"tp": 2}),
        ("fsdp_tp", 3, 1, {"dp_shard": 3}),
        ("fsdp_tp", 4, 1, {"dp_shard": 2, "tp": 2}),
        ("fsdp_tp", 32, 4, {"dp_shard": 4, "tp": 8}),
        ("hsdp_tp", 8, 1, {"dp_replicate": 2, "dp_shard": 2, "tp": 2}),
    ],
)
def test_a_plan_chooses_sensible_sizes(plan: str, world: int, hosts: int, expected: dict[str, int]) -> None:
    assert sizes(f"parallel={plan}", world=world, hosts=hosts) == expected


@pytest.mark.parametrize(
    ("overrides", "world", "expected"),
    [
        (["parallel=fsdp_tp", "mesh.tp=4"], 8, {"dp_shard": 2, "tp": 4}),
        (["parallel=fsdp_tp", "mesh.dp_shard=4"], 8, {"dp_shard": 4, "tp": 2}),
        (["parallel=hsdp", "mesh.dp_shard=4"], 8, {"dp_replicate": 2, "dp_shard": 4}),
        (["parallel=hsdp", "mesh.dp_replicate=4", "mesh.dp_shard=-1"], 8, {"dp_replicate": 4, "dp_shard": 2}),
        (["parallel=fsdp_tp", "mesh=tp8"], 16, {"dp_shard": 2, "tp": 8}),
    ],
)
def test_what_is_given_is_kept_and_the_rest_follows(
    overrides: list[str], world: int, expected: dict[str, int]
) -> None:
    assert sizes(*overrides, world=world) == expected


def test_hosts_have_a_replica_each_where_that_divides_the_ranks() -> None:
    assert sizes("parallel=hsdp", world=12, hosts=2) == {"dp_replicate": 2, "dp_shard": 6}
    assert sizes("parallel=hsdp_tp", "mesh.tp=4", world=12, hosts=2) == {"dp_replicate": 3, "tp": 4}


def test_plan_only_takes_its_world_from_what_is_given() -> None:
    assert planned_world(config("plan_only=true", "world_size=64")) == 64
    assert planned_world(config("plan_only=true", "mesh.tp=8")) == 8
    assert planned_world(config("plan_only=true")) == 4
    assert planned_world(config("plan_only=true", "mesh.tp=2")) == 4
    assert planned_world(config("plan_only=true", "parallel=fsdp", "mesh.dp_shard=-1")) == 4
    assert planned_world(config("plan_only=true", "parallel=none")) == 1


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [
        ("parallel=none", 1),
        ("parallel=none world_size=8", 1),
        ("parallel=tp", 4),
        ("parallel=tp mesh.tp=2", 2),
        ("parallel=fsdp_tp mesh.tp=2", 4),
        ("parallel=fsdp_tp mesh.tp=8", 8),
        ("parallel=fsdp_tp mesh.tp=3", 3),
        ("parallel=fsdp_tp mesh.tp=2 mesh.dp_shard=3", 6),
        ("parallel=fsdp_tp mesh.tp=2 mesh.dp_shard=-1", 4),
        ("parallel=fsdp world_size=2", 2),
        ("parallel=fsdp world_size=2 plan_only=true", 1),
    ],
)
def test_a_job_has_the_ranks_that_its_own_mesh_needs(overrides: str, ranks: int) -> None:
    assert ranks_needed(config(*overrides.split()), 4) == ranks


@pytest.mark.parametrize(
    ("overrides", "batch"),
    [
        (["mesh.tp=8", "world_size=512"], 64),
        (["parallel=fsdp", "world_size=7"], 14),
        (["parallel=fsdp", "world_size=4", "train.micro_batch_size=3"], 12),
        (["parallel=fsdp", "world_size=4", "train.micro_batch_size=1"], 8),
    ],
)
def test_a_plan_that_is_looked_at_takes_a_batch_that_fits(overrides: list[str], batch: int) -> None:
    cfg = config("plan_only=true", *overrides)
    assert with_batch_that_fits(cfg, validate(cfg, 1)).train.global_batch_size == batch


@pytest.mark.parametrize(
    ("overrides", "world", "says"),
    [
        (["parallel=none"], 1, None),
        (["parallel=fsdp_tp"], 4, None),
        (
            ["parallel=fsdp_tp"],
            2,
            "parallel=fsdp_tp on 2 ranks runs without dp_shard (size 1); with 4 ranks ",
        ),
        (
            ["parallel=fsdp_tp"],
            1,
            "parallel=fsdp_tp on 1 rank runs without dp_shard and tp (size 1); with 4 ",
        ),
        (["parallel=fsdp_tp", "mesh.tp=8"], 8, "runs without dp_shard (size 1); with 16 ranks "),
        (
            ["parallel=hsdp_tp"],
            4,
            "parallel=hsdp_tp on 4 ranks runs without dp_shard (size 1); with 8 ranks ",
        ),
    ],
)
def test_an_axis_of_one_rank_that_the_plan_is_named_for_is_said(
    overrides: list[str], world: int, says: str | None
) -> None:
    cfg = config(*overrides)
    said = warning_of_unused_axes(validate(cfg, world), cfg.parallel)
    assert said is None if says is None else said is not None and says in said


def test_a_budget_in_tokens_is_rounded_up_to_steps() -> None:
    assert total_steps(config("train.steps=null", "train.tokens=1000")) == 8  # of 8 * 16 tokens


@pytest.mark.parametrize(
    ("plan", "mesh", "fix", "nproc"),
    [
        ("tp", MeshSizes(tp=6), {"mesh.tp": 4}, 4),
        ("fsdp_tp", MeshSizes(dp_shard=2, tp=3), {"mesh.tp": 2} | OTHERS, None),
        ("fsdp_tp", MeshSizes(dp_shard=4, tp=3), {"mesh.tp": 4} | OTHERS, None),
    ],
)
def test_the_size_that_is_proposed_divides_all_counts_and_the_ranks(
    plan: str, mesh: MeshSizes, fix: dict[str, object], nproc: int | None
) -> None:
    """Alone, the next smaller one on as many ranks; beside data parallelism the largest of these ranks."""
    counts = [ShardedCount("tp", f"model.{name}", count, "a rule") for name, count in COUNTS.items()]
    with pytest.raises(ConfigError, match=r"legal for this model: 1 2 4 8$") as refused:
        check_divisible(config(f"parallel={plan}").parallel, mesh, counts)
    assert (refused.value.fix, refused.value.nproc) == (fix, nproc)
