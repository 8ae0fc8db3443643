"""`python train.py plan_only=true`: the compiled plan, with no ranks and no GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.trainings import Start

pytestmark = pytest.mark.cli


def cells(line: str) -> list[str]:
    """The filled cells of a line of the table."""
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


# A plan on 64 ranks with tp=8 where it has one: sizes, placement and local shape of llama2_tiny's wq (256 x 256).
PLANS = [
    ("fsdp_tp", "mesh.tp=8", "{'dp_shard': 8, 'tp': 8}", "dp_shard: Shard(0), tp: Shard(0)", "4x256"),
    (
        "hsdp_tp",
        "mesh.tp=8 mesh.dp_shard=4",
        "{'dp_replicate': 2, 'dp_shard': 4, 'tp': 8}",
        "dp_shard: Shard(0), tp: Shard(0)",
        "8x256",
    ),
    ("fsdp", "", "{'dp_shard': 64}", "dp_shard: Shard(0)", "4x256"),
    ("hsdp", "mesh.dp_shard=8", "{'dp_replicate': 8, 'dp_shard': 8}", "dp_shard: Shard(0)", "32x256"),
    ("ddp", "", "{'dp_replicate': 64}", "replicated", "256x256"),
    ("tp", "world_size=8 mesh.tp=8", "{'tp': 8}", "tp: Shard(0)", "32x256"),
    ("sp", "world_size=8", "{'tp': 8}", "tp: Shard(0)", "32x256"),
    ("none", "world_size=1", "{}", "replicated", "256x256"),
]


@pytest.mark.parametrize(
    ("parallel", "more", "sizes", "placement", "shape"), PLANS, ids=[row[0] for row in PLANS]
)
def test_every_parallel_plan_is_printed(
    train_py: Start, parallel: str, more: str, sizes: str, placement: str, shape: str
) -> None:
    world = [] if "world_size" in more else ["world_size=64"]
    done = train_py(
        "plan_only=true", "train.global_batch_size=64", f"parallel={parallel}", *world, *more.split()
    )
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert lines[0].endswith(f": {sizes}")
    (wq,) = [line for line in lines if line.startswith("layers.{0-1}.attention.wq.weight")]
    tensor = ["qkv (colwise)"] if "tp:" in placement else []
    assert cells(wq)[1:] == [*tensor, placement, shape]


def test_the_table_says_what_each_module_sends(train_py: Start, small: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "cwd"
    done = train_py(*small, "plan_only=true", "parallel=tp", "mesh.tp=2", "world_size=2")
    table = {cells(line)[0]: cells(line)[1:] for line in done.out.splitlines() if line}
    assert table["layers.{0-1}.attention.wo.weight"] == [
        "out (rowwise)",
        "tp: Shard(1)",
        "64x32",
        "forward: all-reduce",
    ]
    assert table["layers.{0-1}.attention"][-1] == "backward: all-reduce"
    assert table["output.weight"][:3] == ["logits (colwise)", "tp: Shard(0)", "150x64"]
    assert "loss: on vocabulary shards" in done.out
    assert not list(folder.iterdir()), "nothing is written, since the disk may be full"


def test_a_plan_for_many_ranks_needs_no_batch_that_fits(train_py: Start) -> None:
    done = train_py("plan_only=true", "model=llama2_debug", "world_size=512", "mesh.tp=4", "data.seq_len=16")
    assert done.code == 0, done.err
    assert done.out.splitlines()[:3] == [
        "model=llama2_debug parallel=fsdp_tp world_size=512: {'dp_shard': 128, 'tp': 4}",
        "train.global_batch_size=24 does not fit this mesh: shown for 128",
        "",
    ]


def test_it_starts_no_ranks_and_needs_no_data_of_its_own(train: Start, tmp_path: Path) -> None:
    """The real command, cold, with 64 ranks to plan for and none to run on."""
    words = "plan_only=true", "mesh.tp=8", "world_size=64", "tokenizer=bpe_32k"
    done = train(None, tmp_path, *words, cold=True)
    assert done.code == 0, done.err
    assert done.out.startswith(
        "model=llama2_tiny parallel=fsdp_tp world_size=64: {'dp_shard': 8, 'tp': 8}\n"
    ), done.out
