"""The mesh and the sharded model as they are printed, and the mesh of FSDP."""

from __future__ import annotations

import pytest
from support.composed import config

from tpresearch.config.axes import MeshSizes
from tpresearch.config.schema import Config
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.device import FAKE
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh, data_mesh
from tpresearch.plan.describe import describe_mesh, describe_model
from tpresearch.train.preflight import plan_model
from tpresearch.verify.ranks import Ranks


def test_the_printed_mesh_has_the_axes_of_the_command_line() -> None:
    two = describe_mesh(MeshSizes(dp_shard=2, tp=2), "cuda")
    assert two == "DeviceMesh('cuda', [[0, 1], [2, 3]], mesh_dim_names=('dp_shard', 'tp'))"
    assert describe_mesh(MeshSizes(tp=4), "cpu") == "DeviceMesh('cpu', [0, 1, 2, 3], mesh_dim_names=('tp',))"
    three = describe_mesh(MeshSizes(dp_replicate=2, dp_shard=2, tp=2), "cpu")
    assert "[[[0, 1], [2, 3]], [[4, 5], [6, 7]]]" in three


@pytest.mark.parametrize(
    ("sizes", "axes"),
    [
        (MeshSizes(dp_shard=2, tp=2), ("dp_shard",)),
        (MeshSizes(tp=4), ("dp_shard",)),
        (MeshSizes(dp_replicate=4), ("dp_replicate", "dp_shard")),
        (MeshSizes(dp_replicate=2, dp_shard=2), ("dp_replicate", "dp_shard")),
    ],
    ids=str,
)
def test_state_is_sharded_along_one_axis_and_replicated_along_another(
    sizes: MeshSizes, axes: tuple[str, ...]
) -> None:
    with process_group(FAKE, World(size=4, local_size=4)):
        assert data_mesh(build_mesh(sizes, "cpu")).mesh_dim_names == axes


def described(world: World, cfg: Config, size: int) -> str:
    model, plan = plan_model(cfg, sizes := validate(cfg, size))
    with process_group(FAKE, World(size=size, local_size=size)):
        parallelize(model, plan, cfg.parallel, build_mesh(sizes, "cpu"), cfg.train.dtype)
        return describe_model(model)


def test_the_printed_model_is_the_sharded_one(ranks: Ranks) -> None:
    (text,) = ranks.run(1, described, config("model=llama2_debug", "parallel=fsdp_tp"), 8)
    lines = [line.split() for line in text.splitlines()]
    assert lines[0] == ["Llama2"]
    wq = [
        "layers.{0-1}.attention.wq.weight",
        "dp_shard:",
        "Shard(0),",
        "tp:",
        "Shard(0)",
        "8x64",
        "of",
        "64x64",
    ]
    assert wq in lines
    assert ["norm.weight", "dp_shard:", "Shard(0)", "16", "of", "64"] in lines
    (whole,) = ranks.run(1, described, config("model=llama2_debug", "parallel=none"), 1)
    assert ["norm.weight", "replicated", "64"] in [line.split() for line in whole.splitlines()]
