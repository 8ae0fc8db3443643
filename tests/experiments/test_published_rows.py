"""Published rows as they are read, and the configs and clusters that stand for them."""

from __future__ import annotations

from pathlib import Path

import pytest
from published.configs import is_gpt, parts
from published.recorded import recorded
from published.row import Row, read
from published.stacks import ELSEWHERE, cluster_name, cluster_of_row

from tpresearch.config.errors import ConfigError
from tpresearch.simulate.cluster import parse_cluster

SMALL = {
    "dim": "8",
    "heads": "2",
    "layers": "2",
    "ffn": "16",
    "vocab": "64",
    "seq": "2k",
    "gpus": "1,024",
    "gpu": "H100",
}


@pytest.mark.parametrize(
    ("cells", "rate"),
    [
        ({"engine": "composer"}, 0.62),
        ({"engine": "nemo", "notes": "2024"}, 0.70 * ELSEWHERE),
        ({"engine": "other", "notes": "measured in July 2024"}, 0.62 * ELSEWHERE),
        ({"engine": "other", "source_file": "benchmarks/2025-06.md"}, 0.70 * ELSEWHERE),
        ({"engine": "other", "source_file": "arXiv 2307.09288, table 2"}, 0.62 * ELSEWHERE),
        ({"engine": "other"}, 0.645 * ELSEWHERE),
        ({"engine": "other", "gpu": "A100"}, 0.755 * ELSEWHERE),
        ({"engine": "torchtitan"}, 0.62 * ELSEWHERE),
        ({"engine": "torchtitan", "gpu_note": "500 W"}, 0.57),
        ({"engine": "torchtitan", "gpu": "A100"}, 0.755),
    ],
)
def test_matmuls_of_a_hopper_card_are_as_fast_as_software_of_their_year(
    cells: dict[str, str], rate: float
) -> None:
    numbers = cluster_of_row(Row({**SMALL, **cells}))["numbers"]
    assert numbers["gemm_efficiency"]["value"] == pytest.approx(rate)


@pytest.mark.parametrize(("engine", "slowdown"), [("composer", 0.01), ("other", 0.005)])
def test_llm_foundrys_steps_grow_with_hosts_as_its_rows_say_and_others_as_sites_do(
    engine: str, slowdown: float
) -> None:
    numbers = cluster_of_row(Row({**SMALL, "engine": engine}))["numbers"]
    assert numbers["scale_slowdown"]["value"] == pytest.approx(slowdown)


@pytest.mark.parametrize(
    ("cells", "name"),
    [
        ({"gpu": "NVIDIA H100-SXM5-80GB"}, "h100_dgx"),
        ({"gpu_note": "SXM5 HBM2e 500 W"}, "h100_500w"),
        ({"gpu": "h100_80gb"}, "h100_dgx"),
        ({"gpu": "H100 PCIe"}, "h100_pcie"),
        ({"gpu": "8xA100", "gpu_mem_gb": "40 GB"}, "a100_40"),
        ({"gpu": "A100-SXM4-40GB"}, "a100_40"),
    ],
)
def test_a_card_is_found_in_a_longer_name(cells: dict[str, str], name: str) -> None:
    assert cluster_name(Row({**SMALL, **cells})) == name


@pytest.mark.parametrize(
    ("cells", "gb_s"),
    [
        ({"gpu": "A100"}, 25),
        ({"gpu": "A100", "notes": "AWS p4d.24xlarge"}, 6.25),
        ({"gpu": "A100", "notes": "AWS p4d.24xlarge", "internode_gbps_per_gpu": "200 Gbps"}, 25),
        ({"gpu_note": "a3-megagpu-8g"}, 25),
    ],
)
def test_a_network_that_is_not_stated_is_the_clouds(cells: dict[str, str], gb_s: float) -> None:
    assert cluster_of_row(Row({**SMALL, **cells}))["numbers"]["inter_gb_s"]["value"] == gb_s


@pytest.mark.parametrize("gpu", ["GH200", "MI300X", "H100 NVL", "A100-PCIE-40GB", "H20", ""])
def test_a_card_of_another_kind_is_refused(gpu: str) -> None:
    with pytest.raises(ConfigError, match="gpu"):
        cluster_name(Row({**SMALL, "gpu": gpu}))


@pytest.mark.parametrize(
    ("cells", "name", "per_host"),
    [
        ({"gpu": "NVIDIA GB200", "gpu_note": "NVL72", "gpus_per_node": "4"}, "gb200_nvl72", 64),
        ({"gpu": "GB300"}, "gb300_nvl72", 64),
        ({"gpu": "B200", "gpus_per_node": "4"}, "b200", 4),
        ({"gpu": "H800-SXM"}, "h800_dgx", 8),
    ],
)
def test_a_host_of_a_rack_is_the_rack(cells: dict[str, str], name: str, per_host: int) -> None:
    cluster = parse_cluster(cluster_of_row(Row({**SMALL, **cells})))
    assert (cluster.name, cluster.devices_per_host) == (name, per_host)


def test_cells_are_read_with_their_units() -> None:
    row = Row({**SMALL, "step_s": "1,200 ms", "internode_gbps_per_gpu": "50 GB/s", "ac": "selective op"})
    assert (row.count("seq"), row.world, row.measured_s) == (2048, 1024, pytest.approx(1.2))
    assert row.number("internode_gbps_per_gpu") == 400
    assert len(parts(row)) == 2
    told = Row({**SMALL, "tok_s_gpu": "2.048k", "mb": "3", "ga": "2"})
    assert told.measured_s == pytest.approx(6.0)


@pytest.mark.parametrize(
    ("cells", "overlaps"),
    [
        ({"engine": "nemo/megatron"}, True),
        ({"engine": "nemo/megatron", "async_tp": "0"}, False),
        ({"engine": "nemo/megatron", "sp": "0"}, False),
        ({"engine": "megatron"}, False),
        ({"engine": "torchtitan", "async_tp": "1"}, True),
    ],
)
def test_messages_of_tensor_parallelism_overlap_where_the_row_or_its_software_says_so(
    cells: dict[str, str], overlaps: bool
) -> None:
    (part,) = parts(Row({**SMALL, "tp": "8", "sp": "1", **cells}))
    assert ("parallel.async_tp=true" in part.overrides) == overlaps


@pytest.mark.parametrize("name", ["pp", "cp", "ep"])
def test_a_row_of_parallelism_that_is_not_here_is_refused(name: str) -> None:
    assert parts(Row({**SMALL, name: "1"}))
    with pytest.raises(ConfigError, match=f"{name}=2"):
        parts(Row({**SMALL, name: "2"}))


@pytest.mark.parametrize("name", ["step_s", "tok_s_gpu"])
def test_a_row_whose_measurement_is_no_number_is_refused_before_it_is_simulated(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name}=fast: "):
        recorded(Row({name: "fast", "gpu": "no card"}))


@pytest.mark.parametrize(
    "cells",
    [
        {"gbs": "100", "mb": "1", "ga": "1"},
        {"dp_shard": "512"},
        {"tp": "3"},
        {"layers": ""},
        {"layers": "-2"},
        {"layers": "1e999"},
        {"gpus": "1e12"},
        {"gpus": "1,000,000"},
        {"gpu": "A100", "compute_dtype": "fp8"},
        {"dim": "47,73"},
        {"arch": "mixtral"},
        {"model": "mamba-2.8b"},
        {"arch": "unheard of"},
        {"experts": "8"},
    ],
)
def test_a_row_that_contradicts_itself_or_cannot_be_read_is_refused(cells: dict[str, str]) -> None:
    row = {**SMALL, "arch": "llama"}
    assert parts(Row(row))
    with pytest.raises(ConfigError):
        parts(Row(row | cells))


def test_what_a_row_leaves_open_of_its_batch_follows_from_the_rest() -> None:
    told = Row({**SMALL, "gpus": "16", "gbs": "96", "mb": "2"})
    assert told.batch == (2, 3)
    assert Row({**SMALL, "ga": "4,096"}).batch == (1, 4096)
    assert Row({**SMALL, "gpus": "16", "tp": "4", "gbs": "96", "ga": "4"}).batch == (6, 4)


@pytest.mark.parametrize(
    ("cells", "gpt"),
    [
        ({"arch": "llama", "ffn_kind": "swiglu"}, False),
        ({"arch": "gpt-neox", "ffn_kind": ""}, True),
        ({"model": "Mistral-7B"}, False),
        ({"arch": "other", "ffn_kind": "gelu"}, True),
        ({}, False),
    ],
)
def test_a_family_is_found_by_its_feed_forward_or_its_name(cells: dict[str, str], gpt: bool) -> None:
    assert is_gpt(Row(cells)) is gpt


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_rows_are_read_whatever_separates_them(tmp_path: Path, separator: str) -> None:
    lines = [["ID", " gpus", "notes"], ["A", "8", '"two\nlines"'], ["", "16"], [""]]
    text = "\ufeff" + "\r\n".join(separator.join(line) for line in lines)
    (tmp_path / "rows.csv").write_text(text, newline="", encoding="utf-8")
    first, second = read(tmp_path / "rows.csv")
    assert (first["id"], first.world, first["notes"]) == ("A", 8, "two\nlines")
    assert (second["id"], second.world, second["notes"]) == ("row 2", 16, "")
