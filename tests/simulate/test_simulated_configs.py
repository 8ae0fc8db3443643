"""What of a config is refused before a step is recorded, and what is pointed out beside its prediction."""

from __future__ import annotations

import re

import pytest
from support.composed import config

from tpresearch.config.axes import MeshSizes
from tpresearch.config.errors import ConfigError
from tpresearch.config.world import World
from tpresearch.launch.composition import read_option
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.simulate.prediction import Prediction
from tpresearch.simulate.preflight import check_simulation, preflight
from tpresearch.simulate.report import memory_text, report


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ("world_size=12", "world_size=12: "),
        ("cluster.hosts=1 world_size=64", "world_size=64: cluster h100_dgx has 8 devices on 1 hosts"),
        ("~cluster.numbers.intra_gb_s", "cluster.numbers.intra_gb_s=null: not stated"),
        ("train.dtype=float64 cluster.numbers.peak_tflops_float64.value=0", "train.dtype=float64: "),
        ("parallel.fsdp.cpu_offload=true", "parallel.fsdp.cpu_offload=true: "),
        (
            "cluster=a100_80 train.float8=rowwise",
            "train.float8=rowwise: cluster a100_80 states no peak_tflops_float8",
        ),
        (
            "train.float8=rowwise train.float8_emulated=true",
            "train.float8=rowwise: its emulation is not simulated",
        ),
    ],
)
def test_what_cannot_be_simulated_is_refused_by_its_key(words: str, refusal: str) -> None:
    cfg = config("model=llama2_debug", "train.dtype=bfloat16", *words.split(), program="simulate")
    with pytest.raises(ConfigError, match=f"^{re.escape(refusal)}"):
        preflight(cfg, World())


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ("parallel=none", 1),
        ("parallel=fsdp_tp mesh.dp_shard=2 mesh.tp=2", 4),
        ("parallel=fsdp_tp mesh.tp=2", 8),
        ("parallel=hsdp mesh.dp_shard=16", 16),
        ("parallel=hsdp_tp mesh.dp_replicate=4 mesh.tp=4", 16),
    ],
)
def test_without_a_world_size_there_are_the_ranks_of_the_mesh_or_of_a_host(words: str, ranks: int) -> None:
    cfg = config("model=llama2_debug", "train.global_batch_size=16", *words.split(), program="simulate")
    assert check_simulation(cfg, World()).sizes.world == ranks


@pytest.mark.parametrize("kind", ["none", "full"])
def test_what_would_hold_less_is_not_what_is_set_already(kind: str) -> None:
    cfg = config("model=llama2_debug", f"parallel.activation_checkpointing={kind}")
    h100, held = parse_cluster(read_option("cluster", "h100_dgx")), {"parameters": 10**12}
    held |= {"activations": 0, "other": 0}
    text = memory_text(Prediction(h100, MeshSizes(dp_shard=4), cfg, {"step": 1.0}, 1.0, [], held))
    assert text.startswith("1000.0 of 85 GB: does not fit; ")
    assert ("parallel.activation_checkpointing=full" in text) == (kind == "none")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_dtype_in_which_a_card_is_slow_is_pointed_out(dtype: str) -> None:
    cfg, held = config("model=llama2_debug", f"train.dtype={dtype}"), {"parameters": 1, "reserved": 1}
    h100 = parse_cluster(read_option("cluster", "h100_dgx"))
    text = report(Prediction(h100, MeshSizes(), cfg, {"step": 1.0}, 1.0, [], held))
    said = "float32               67 instead of 989 TFLOP/s with train.dtype=bfloat16"
    assert (said in text) == ("instead of" in text) == (dtype == "float32")
