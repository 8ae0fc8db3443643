"""Collectives between GPUs as a cluster's links: from times by a formula, and rehearsed on gloo ranks as if of two hosts."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tpresearch.calibrate import cuda, links
from tpresearch.calibrate.__main__ import Options, _new_cluster
from tpresearch.calibrate.rows import cluster_from_rows
from tpresearch.config.errors import ConfigError
from tpresearch.config.world import World
from tpresearch.launch.composition import read_option
from tpresearch.parallel.device import CPU, Device
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.verify.ranks import RankError, Ranks

BASE = read_option("cluster", "h100_dgx")
SMALL, LARGE = 4096, 1 << 28


def of_a_ring(where: str, ranks: int, fixed_us: float, step_us: float, gb_s: float) -> list[dict[str, Any]]:
    """NCCL's LL protocol with a fifth of the step's latency for a small tensor, Simple for a large one."""
    rows = []
    for op, passes in (("all_gather", 1), ("reduce_scatter", 1), ("all_reduce", 2)):
        for size, share in ((SMALL, 0.2), (LARGE, 1.0)):
            sent = passes * size * (ranks - 1) / ranks if size == LARGE else 0.0
            us = fixed_us + passes * (ranks - 1) * step_us * share + sent / gb_s / 1e3
            rows.append(
                {"op": f"{op} {where}", "shape": [size, ranks], "us": us, "flops": 0.0, "bytes": sent}
            )
    return rows


def test_links_are_those_of_the_measured_rings() -> None:
    measured = [*of_a_ring("in a host", 4, 12.0, 6.0, 170.0), *of_a_ring("across hosts", 3, 12.0, 21.0, 43.0)]
    plain = {**BASE, "numbers": {**BASE["numbers"]}}
    for name, ratio in (("collective_us", 12.0), ("intra_step_us", 6.0)):  # one ratio of both is measured
        plain["numbers"][name] = {"value": 1.7 * ratio, "kind": "guessed", "source": "a guess"}
    found = parse_cluster(cluster_from_rows(measured, plain, "mine"))
    assert found["collective_us"] == pytest.approx(12)
    assert found["intra_step_us"] == pytest.approx(6)
    assert found["intra_gb_s"] == pytest.approx(170)
    assert found["inter_step_us"] == pytest.approx(21)
    assert found["inter_gb_s"] * found["inter_efficiency"] == pytest.approx(43)
    assert found.devices_per_host == 4
    assert {str(found.numbers[name].kind) for name in ("intra_gb_s", "inter_gb_s")} == {"measured"}
    assert found.numbers["gemm_efficiency"].source == BASE["numbers"]["gemm_efficiency"]["source"]


def test_one_host_tells_nothing_of_the_network() -> None:
    found = cluster_from_rows(of_a_ring("in a host", 8, 10.5, 10.0, 350.0), BASE, "mine")
    assert found["numbers"]["intra_gb_s"]["value"] == pytest.approx(350)
    assert found["devices_per_host"] == 8
    for name in ("inter_gb_s", "inter_step_us", "inter_efficiency"):
        assert found["numbers"][name] == BASE["numbers"][name]


def test_a_tray_tells_of_the_links_of_its_rack_and_not_of_the_network() -> None:
    base = read_option("cluster", "gb200_nvl72")
    measured = [
        *of_a_ring("in a host", 4, 12.0, 6.0, 600.0),
        *of_a_ring("across hosts", 3, 12.0, 21.0, 600.0),
    ]
    found = cluster_from_rows(measured, base, "mine")
    assert found["numbers"]["intra_gb_s"]["value"] == pytest.approx(600, rel=0.03)
    assert found["numbers"]["inter_gb_s"] == base["numbers"]["inter_gb_s"]
    assert [found[key] for key in ("devices_per_host", "devices_per_node")] == [64, 4]


class Event:
    """An event on the host's clock, since gloo's collectives return when they are done."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end.at - self.at) * 1e3


def two_hosts(world: World) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """Rows of four ranks as if on two hosts, and the ranks of each group that this one is in."""
    groups, groups_of = list[list[int]](), links._groups

    def noted(world: World) -> Iterator[tuple[str, dist.ProcessGroup]]:
        for name, group in groups_of(world):
            groups.append(dist.get_process_group_ranks(group))
            yield name, group

    patch = pytest.MonkeyPatch()
    patch.setattr(torch.cuda, "Event", Event)
    patch.setattr(torch.cuda, "synchronize", lambda: None)
    patch.setattr(cuda, "LOAD_SIZE", 16)
    patch.setattr(cuda, "REPEATS", 3)
    patch.setattr(links, "LARGE_BYTES", 2**20)
    patch.setattr(links, "_groups", noted)
    return links.link_rows(World(world.rank, 4, world.rank % 2, 2, elastic=True), CPU), groups


def test_ranks_of_two_hosts_measure_a_host_and_one_rank_of_each() -> None:
    (rows, _), *_ = found = Ranks().run(4, two_hosts)
    assert [groups for _, groups in found] == [
        [[0, 1], [0, 2]],
        [[0, 1], [1, 3]],
        [[2, 3], [0, 2]],
        [[2, 3], [1, 3]],
    ]
    ops = ("all_gather", "reduce_scatter", "all_reduce")
    places = ("in a host", "across hosts")
    assert [row["op"] for row in rows] == [
        f"{op} {place}" for place in places for _ in range(2) for op in ops
    ]
    assert {tuple(row["shape"]) for row in rows} == {(SMALL, 2), (2**20, 2)}
    assert [row["bytes"] for row in rows[3:6]] == [2**19, 2**19, 2**20]
    cluster = parse_cluster(cluster_from_rows(rows, BASE, "mine"))
    assert cluster["intra_gb_s"] >= rows[3]["bytes"] / max(row["us"] for row in rows[3:6]) / 1e3
    assert cluster.devices_per_host == 2


def test_gpus_that_cannot_communicate_are_measured_singly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Ranks, size: int, function: object) -> None:
        raise RankError(f"rank 0 of {size}:\nTraceback (most recent call last):\nDistBackendError: no route")

    monkeypatch.setattr(Ranks, "run", fail)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert links.measure_links(World())[0]["error"] == "DistBackendError: no route"
    assert "collectives of 8 GPUs failed: DistBackendError: no route" in capsys.readouterr().out
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert links.measure_links(World()) == []


@pytest.mark.parametrize("gpus", [0, 2])
def test_ranks_without_a_gpu_each_are_refused(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ConfigError, match=r"^WORLD_SIZE=4: "):
        _new_cluster(Options(out="here.yaml"), "here", World(0, 4, 0, 4, elastic=True))


def on_one_card(world: World) -> list[dict[str, Any]]:
    patch = pytest.MonkeyPatch()
    patch.setattr(links, "LARGE_BYTES", 2**20)
    return links.link_rows(world, Device(torch.device("cuda", 0), "nccl", "gpu", shared=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_nccl_is_measured_on_the_card() -> None:
    rows = Ranks().run(2, on_one_card)[0]
    assert len(rows) == 6
    assert all(row["us"] > 0 for row in rows)
