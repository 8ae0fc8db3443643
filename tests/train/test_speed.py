"""Peaks by name; undefined where unknown."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.assembled import planned
from support.composed import config
from support.nets import Recurrent, model

from tpresearch.config.schema import Dtype
from tpresearch.launch.composition import conf_dir, read_option
from tpresearch.plan.meta import meta_model
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.train.speed import flops_per_token, peak_flops


def test_a_known_device_has_its_makers_peak() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", Dtype.bfloat16) == 989e12
    assert peak_flops("NVIDIA H100 PCIe", Dtype.bfloat16) == 756e12
    assert peak_flops("NVIDIA H200", Dtype.bfloat16) == 989e12
    assert peak_flops("NVIDIA H200 NVL", Dtype.bfloat16) == 835e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", Dtype.float32) == 19.5e12
    assert peak_flops("NVIDIA L40S", Dtype.bfloat16) == 362e12


@pytest.mark.parametrize("path", sorted((conf_dir() / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_cluster_s_device_has_the_peaks_of_its_file(path: Path) -> None:
    cluster = parse_cluster(read_option("cluster", path.stem))
    stated = {dtype: None if cluster.is_cpu else cluster.peak_flops(dtype) for dtype in Dtype}
    assert {dtype: peak_flops(cluster.device, dtype) for dtype in Dtype} == stated


def test_an_unknown_one_has_none() -> None:
    assert peak_flops("cpu", Dtype.float32) is None
    assert peak_flops("NVIDIA L40", Dtype.bfloat16) is None
    assert peak_flops("NVIDIA GeForce RTX 4090 Laptop GPU", Dtype.bfloat16) is None
    assert peak_flops("NVIDIA GeForce RTX 4090 D", Dtype.bfloat16) is None
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb", Dtype.bfloat16) is None
    assert peak_flops("NVIDIA L4", Dtype.float64) is None


def test_a_tied_embedding_multiplies_as_an_output_layer() -> None:
    """6 FLOPs per weight and token: of 260 x 64 once, whether that weight is the embedding too or not."""
    plain, tied = (
        flops_per_token(meta_model(config("model=llama2_debug", f"model.tied={on}").model), 16, False)
        for on in ("false", "true")
    )
    assert plain == tied


def test_a_block_that_runs_three_times_on_a_token_counts_each_time() -> None:
    once, _ = planned("model=toy_mlp", "parallel=none")
    net, plan = planned(*model(Recurrent), "parallel=none")
    block = sum(p.numel() for p in net.get_submodule("mlp").parameters())
    of_once = flops_per_token(once, 16, causal=False)
    assert flops_per_token(net, 16, causal=False, called=plan.probe.called) == of_once + 2 * 6 * block
