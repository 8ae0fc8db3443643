from __future__ import annotations

import dataclasses

import pytest
from support.example_run import example_config

from tpresearch.config.choices import Dtype, Float8, WeightDtype
from tpresearch.config.schema import DataPlan, ParallelConfig, TensorPlan
from tpresearch.config.training import OptimizerConfig, TrainConfig
from tpresearch.track.text import run_name


@pytest.mark.parametrize(
    ("data", "tensor", "sizes", "name"),
    [
        ("none", None, {}, "single"),
        ("ddp", None, {"dp_replicate": 4}, "ddp4"),
        ("none", "tp", {"tp": 4}, "tp4"),
        ("none", "sp", {"tp": 4}, "sp4"),
        ("fsdp", None, {"dp_shard": 4}, "fsdp4"),
        ("fsdp", None, {}, "fsdp1"),
        ("hsdp", None, {"dp_replicate": 2, "dp_shard": 2}, "hsdp2x2"),
        ("fsdp", "sp", {"dp_replicate": 1, "dp_shard": 2, "tp": 2}, "fsdp2-tp2"),
        ("hsdp", "sp", {"dp_replicate": 2, "dp_shard": 2, "tp": 2}, "hsdp2x2-tp2"),
    ],
)
def test_a_run_is_named_by_its_model_and_layout(
    data: str, tensor: str | None, sizes: dict[str, int], name: str
) -> None:
    plan = ParallelConfig("any", TensorPlan(tensor) if tensor else None, DataPlan(data))

    def named(train: TrainConfig, optimizer: OptimizerConfig) -> str:
        cfg = dataclasses.replace(example_config(), parallel=plan, train=train, optimizer=optimizer)
        return run_name(cfg, sizes)

    adamw, train = OptimizerConfig(), TrainConfig()
    assert named(train, adamw) == f"llama2_tiny/{name}"
    moments = OptimizerConfig(moment_dtype=WeightDtype.bfloat16)
    assert named(train, moments) == f"llama2_tiny/{name}-bf16moments"
    narrow = TrainConfig(
        dtype=Dtype.bfloat16, weights=WeightDtype.bfloat16, float8=Float8.rowwise, float8_emulated=True
    )
    labelled = f"llama2_tiny/{name}-bf16weights-float8rowwise"
    for same in adamw, moments:
        assert named(narrow, same) == labelled
    wide = OptimizerConfig(moment_dtype=WeightDtype.float32)
    assert "-bf16weights-fp32moments-" in named(narrow, wide)
