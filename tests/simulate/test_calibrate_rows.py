"""Measurements of single ops as a cluster's numbers, and the command that writes its file."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tpresearch.calibrate import __main__ as calibrate
from tpresearch.calibrate.__main__ import Options, _base_cluster, _new_cluster, as_yaml
from tpresearch.calibrate.rows import cluster_from_rows, read_rows
from tpresearch.config.errors import ConfigError
from tpresearch.config.world import World
from tpresearch.launch import composition
from tpresearch.simulate.cluster import parse_cluster

BASE = composition.read_option("cluster", "h200_dgx")
ROWS = [
    {"card": "NVIDIA H200", "memory_bytes": 150_000_000_000, "torch": "2.13"},
    {"op": "matmul NT", "shape": [4096] * 3, "us": 100.0, "flops": 8e10, "bytes": 0.0},
    {"op": "matmul sustained", "shape": [8192] * 3, "us": 1000.0, "flops": 494.5e9, "bytes": 0.0},
    {"op": "attention forward A", "shape": [2, 32, 8, 4096, 128], "us": 1000.0, "flops": 1e12, "bytes": 0.0},
    {"op": "attention forward B", "shape": [2, 32, 8, 4096, 128], "us": 500.0, "flops": 1e12, "bytes": 0.0},
    {
        "op": "attention forward and backward B",
        "shape": [2, 32, 8, 4096, 128],
        "us": 3000.0,
        "flops": 3.5e12,
        "bytes": 0.0,
    },
    {"op": "copy", "shape": [1], "us": 1000.0, "flops": 0.0, "bytes": 2.4e9},
    {"op": "adamw float32", "shape": [1], "us": 1000.0, "flops": 0.0, "bytes": 1.2e9},
    {"op": "100 launches", "shape": [1], "us": 700.0, "flops": 0.0, "bytes": 0.0},
]


MINE = """
defaults: [h100_dgx]
name: mine
checked: []
numbers:
  inter_gb_s: {value: 25, kind: datasheet, source: our NICs}
"""


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A copy of conf/cluster, which is read instead of it."""
    shutil.copytree(composition.conf_dir(), tmp_path / "conf")
    monkeypatch.setattr(composition, "conf_dir", lambda: tmp_path / "conf")
    return tmp_path / "conf" / "cluster"


def test_rows_become_the_numbers_that_they_measure() -> None:
    found = parse_cluster(cluster_from_rows(ROWS, BASE, "mine"))
    assert found["gemm_efficiency"] == pytest.approx(0.514)  # under load, not when cool, and as in a step
    assert found.table("attention_tflops_forward")[3] == pytest.approx(2000)  # by the faster kernel
    assert found.table("attention_tflops_backward")[3] == pytest.approx(1000)
    assert found["bandwidth_efficiency"] == pytest.approx(0.5)
    assert found["optimizer_efficiency"] == pytest.approx(0.25)
    assert found["launch_us"] == pytest.approx(7)
    assert found["memory_gb"] == pytest.approx(150)
    assert found["intra_gb_s"] == BASE["numbers"]["intra_gb_s"]["value"]  # what no row tells
    kinds = {name: str(number.kind) for name, number in found.numbers.items()}
    assert kinds["gemm_efficiency"] == "measured"
    assert kinds["intra_gb_s"] == "published"


def test_a_calibrated_file_is_read_as_it_was_written() -> None:
    plain = cluster_from_rows(ROWS, {**BASE, "has_switch": False}, "mine")
    again = yaml.safe_load(as_yaml(plain))
    assert again["numbers"].keys() == plain["numbers"].keys()
    assert parse_cluster(again)["launch_us"] == pytest.approx(7)
    assert {**plain, "numbers": None} == {**again, "numbers": None}


def test_what_is_printed_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base has measured numbers too, of other machines."""
    rows, out = tmp_path / "rows.jsonl", tmp_path / "here.yaml"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    monkeypatch.setattr(sys, "argv", ["calibrate", f"rows={rows}", f"out={out}"])
    calibrate.main()
    *printed, _, written = capsys.readouterr().out.splitlines()
    names = "memory_gb gemm_efficiency bandwidth_efficiency optimizer_efficiency copy_efficiency launch_us"
    tables = "attention_tflops_forward attention_tflops_backward"
    assert {line.split()[0] for line in printed} == {*names.split(), *tables.split()}
    assert written.startswith(f"  {out}: ")


@pytest.mark.parametrize(
    "text",
    [
        None,
        "no JSON",
        "[1, 2]",
        '{"us": 5}',
        '{"us": "fast", "op": "copy", "shape": [1], "flops": 0, "bytes": 1}',
        '{"us": NaN, "op": "copy", "shape": [1], "flops": 0, "bytes": 1}',
        '{"us": 5, "op": "copy"}',
        '{"us": true, "op": "copy", "shape": [1], "flops": 0, "bytes": 1}',
        '{"card": "NVIDIA H100 80GB HBM3", "memory_bytes": "80 GB"}',
        '{"card": 3}\n{"us": 5, "op": "copy", "shape": [1], "flops": 0, "bytes": 1e6}',
        '{"op": "all_gather in a host", "shape": [4096], "us": 1.0, "flops": 0.0, "bytes": 1e9}',
        '{"stage": "facts"}',
        '{"us": 5, "op": "attention forward", "shape": [1], "flops": 1, "bytes": 0}',
    ],
)
def test_rows_that_measure_nothing_are_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "rows.jsonl"
    if text is not None:
        path.write_text(text + "\n")
    with pytest.raises(ConfigError, match=r"^rows="):
        cluster_from_rows(read_rows(path), BASE, "mine")


@pytest.mark.parametrize(
    ("card", "gib", "name"),
    [
        ("NVIDIA H200", 139.8, "h200_dgx"),
        ("NVIDIA H100 80GB HBM3", 79.1, "h100_dgx"),
        ("NVIDIA H100", 94.5, "h100_500w"),
        ("NVIDIA H100 PCIe", 79.1, "h100_pcie"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100_40"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100_80"),
        ("NVIDIA L40S", 44.4, "l40s"),
    ],
)
def test_links_and_hosts_are_those_of_a_cluster_with_such_gpus(card: str, gib: float, name: str) -> None:
    assert _base_cluster(None, card, round(gib * 2**30))["name"] == name


def test_a_card_that_no_cluster_has_needs_a_base() -> None:
    with pytest.raises(
        ConfigError, match=r"^base=null: no cluster of conf/cluster has such GPUs \(NVIDIA T4\)"
    ):
        _base_cluster(None, "NVIDIA T4", 16 * 10**9)
    assert _base_cluster("a100_40", "NVIDIA T4", 0)["name"] == "a100_40"


def test_a_base_is_refused_where_no_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"^base=h100_dgx: there is no GPU here"):
        _new_cluster(Options(out="here.yaml", base="h100_dgx"), "here", World())
    with pytest.raises(ConfigError, match=r"^rows="):  # of a variable that is not set
        _new_cluster(Options(out="here.yaml", base="h100_dgx", rows=""), "here", World())


def test_users_clusters_are_read_with_their_defaults(clusters: Path) -> None:
    (clusters / "mine.yaml").write_text(MINE)
    (clusters / "half.yaml").write_text("device: H100\n")
    (clusters / "broken.yaml").write_text("device: [\n")
    assert _base_cluster(None, "NVIDIA H100 80GB HBM3", 85 * 10**9)["name"] == "h100_dgx"
    mine = _base_cluster("mine", "NVIDIA H100 80GB HBM3", 85 * 10**9)
    assert (mine["device"], mine["checked"]) == ("NVIDIA H100 SXM5 80 GB", [])
    assert mine["numbers"]["inter_gb_s"]["source"] == "our NICs"
    assert parse_cluster(mine)["inter_gb_s"] == 25
    with pytest.raises(ConfigError, match=r"^cluster=broken: .*broken.yaml cannot be composed"):
        _base_cluster("broken", "NVIDIA H100 80GB HBM3", 85 * 10**9)


def test_a_number_in_a_users_cluster_is_one_as_simulate_reads_it(clusters: Path) -> None:
    """PyYAML takes 3e3 for text."""
    text = (clusters / "h100_dgx.yaml").read_text()
    (clusters / "mine.yaml").write_text(text.replace("{value: 3350,", "{value: 3e3,"))
    assert parse_cluster(_base_cluster("mine", "NVIDIA H100 80GB HBM3", 0))["bandwidth_gb_s"] == 3000
    (clusters / "five.yaml").write_text("5\n")
    with pytest.raises(ConfigError, match=r"^cluster=five: .*five.yaml cannot be composed"):
        _base_cluster("five", "NVIDIA H100 80GB HBM3", 0)
