"""The mesh as it is printed."""

from __future__ import annotations

from tpresearch.config.axes import MeshSizes
from tpresearch.parallel.mesh import describe_mesh


def test_the_printed_mesh_has_the_axes_of_the_command_line() -> None:
    two = describe_mesh(MeshSizes(dp_shard=2, tp=2), "cuda")
    assert two == "DeviceMesh('cuda', [[0, 1], [2, 3]], mesh_dim_names=('dp_shard', 'tp'))"
    assert describe_mesh(MeshSizes(tp=4), "cpu") == "DeviceMesh('cpu', [0, 1, 2, 3], mesh_dim_names=('tp',))"
    three = describe_mesh(MeshSizes(dp_replicate=2, dp_shard=2, tp=2), "cpu")
    assert "[[[0, 1], [2, 3]], [[4, 5], [6, 7]]]" in three
