"""Which runs scaling efficiency joins, and the shares along each line."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.made_runs import Made, groups_of

from tpresearch.compare.groups import Group, group_over_seeds
from tpresearch.compare.panel_data import scaling
from tpresearch.compare.runs import find_runs


def test_scaling_is_speed_per_device_over_that_on_the_fewest_ranks(tmp_path: Path) -> None:
    runs = [Made("tp", {"tp": tp}, speed=speed) for tp, speed in ((2, 1000.0), (4, 900.0), (8, 500.0))]
    groups = groups_of(tmp_path, Made(), *runs, Made("tp", {"tp": 16}, lr=1e-2, speed=1.0))
    assert list(lines_of(groups).values()) == [[(2, 1.0), (4, 0.9), (8, 0.5)]]
    assert lines_of(groups[:2]) == {}


def lines_of(groups: list[Group]) -> dict[str, list[tuple[int, float]]]:
    lines: dict[str, list[tuple[int, float]]] = {}
    points = scaling(groups, "perf/tokens_per_second_per_device").points
    for point in points.to_dict("records"):
        lines.setdefault(point["line"], []).append((point["ranks"], point["share"]))
    return lines


def test_along_a_line_of_scaling_one_mesh_axis_grows(tmp_path: Path) -> None:
    runs = [
        Made("fsdp_tp", {"tp": 4}, speed=50.0),
        Made("fsdp_tp", {"dp_shard": 2, "tp": 2}, speed=100.0),
        Made("fsdp_tp", {"dp_shard": 4, "tp": 2}, speed=90.0),
        Made("fsdp", {"dp_shard": 2}, speed=80.0),
        Made("fsdp", {"dp_shard": 4}, speed=60.0),
    ]
    assert lines_of(groups_of(tmp_path, *runs)) == {
        "fsdp_tp · 4 ranks · tp=2": [(4, 1.0), (8, 0.9)],
        "fsdp · 2 ranks · tp=–": [(2, 1.0), (4, 0.75)],
    }


def test_of_a_grid_each_run_is_in_one_line_of_scaling(tmp_path: Path) -> None:
    grid = [(2, 2), (2, 4), (2, 8), (4, 2), (4, 4), (4, 8)]
    speeds = {(tp, dp): 100.0 * tp - 10 * dp - dp * tp for tp, dp in grid}
    runs = [Made("fsdp_tp", {"dp_shard": dp, "tp": tp}, speed=speed) for (tp, dp), speed in speeds.items()]
    groups = groups_of(tmp_path, *runs)
    lines = lines_of(groups)
    assert [[ranks for ranks, _ in line] for line in lines.values()] == [[4, 8, 16], [8, 16, 32]]
    assert [line[0][1] for line in lines.values()] == [1.0, 1.0]
    assert [line[2][1] for line in lines.values()] == pytest.approx([104 / 176, 288 / 372])


def test_along_a_line_of_weak_scaling_the_batch_grows_with_the_ranks(tmp_path: Path) -> None:
    sizes = [(2, 16, 100.0), (4, 32, 90.0), (8, 64, 60.0), (16, 64, 50.0), (32, 8, 1.0)]
    runs = [Made("fsdp", {"dp_shard": n}, global_batch_size=rows, speed=speed) for n, rows, speed in sizes]
    groups = groups_of(tmp_path, *runs[:3], runs[4])
    assert list(lines_of(groups).values()) == [[(2, 1.0), (4, 0.9), (8, 0.6)]]
    notes = scaling(groups, "perf/tokens_per_second_per_device").notes
    assert notes == [f"Along lines of {groups[0].label} the global batch grows with the ranks: weak scaling."]
    # With the same batch on more ranks, that is the line of the latter.
    assert [[ranks for ranks, _ in line] for line in lines_of(groups_of(tmp_path, *runs)).values()] == [
        [8, 16],
        [2, 4],
    ]


def test_repetitions_are_points_of_one_line(tmp_path: Path) -> None:
    runs = [Made("tp", {"tp": tp}, seed=seed, speed=100.0 / tp) for seed in (0, 1) for tp in (2, 4)]
    lines = lines_of(groups_of(tmp_path, *runs, runs[0]))
    assert list(lines.values()) == [[(2, 1.0), (2, 1.0), (4, 0.5)], [(2, 1.0), (4, 0.5)]]
    mean = group_over_seeds(find_runs([str(tmp_path)]).runs)
    assert list(lines_of(mean).values()) == [[(2, 1.0), (4, 0.5)]]
