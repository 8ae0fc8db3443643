"""Peaks by name, undefined where unknown; MFU, and the time that it is of, by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from support.assembled import planned
from support.composed import config
from support.nets import FrozenBlock, ReadTwice, Recurrent, model
from torch import Tensor, nn

from tpresearch.config.schema import Dtype
from tpresearch.launch.composition import conf_dir, read_option
from tpresearch.parallel.device import CPU
from tpresearch.plan.meta import meta_model
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.train import watch
from tpresearch.train.speed import Speed, flops_per_token, peak_flops
from tpresearch.train.watch import PeakMemory, Timing

PARTS = ("time/forward_s", "time/backward_s")


class FrozenUpToOutput(FrozenBlock):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.embed.requires_grad_(False)


class OnPatches(nn.Module):
    """A convolution makes two patches of a row of `dim` numbers, and the same layer runs on both."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__()
        self.patches = nn.Conv1d(1, hidden_dim, dim // 2, stride=dim // 2, bias=False)
        self.layer = nn.Linear(hidden_dim, hidden_dim, bias=False)
        self.output = nn.Linear(hidden_dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.layer(self.patches(x.unsqueeze(1)).transpose(1, 2))
        return self.output(patches.mean(1))


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
    assert flops_per_token(net, 16, causal=False, probe=plan.probe) == of_once + 2 * 6 * block


def test_a_layer_counts_at_each_position_of_a_row_of_numbers() -> None:
    """Of a row of 10 numbers, 6 FLOPs per weight at each of two patches, and of the output layer at their mean."""
    of_net = "model=toy_net", f"model._target_={__name__}.OnPatches"
    net, plan = planned(*of_net, "data=uniform", "data.seq_len=1", "train.loss=sum", "parallel=none")
    patches, layer, output = (
        net.get_parameter(f"{name}.weight").numel() for name in ("patches", "layer", "output")
    )
    assert flops_per_token(net, 1, causal=False, probe=plan.probe) == 6 * (2 * patches + 2 * layer + output)


def test_an_embedding_counts_where_another_module_multiplies_by_it() -> None:
    once, _ = planned("model=toy_mlp", "parallel=none")
    net, plan = planned(*model(ReadTwice), "parallel=none")
    table = net.get_parameter("embed.weight").numel()
    found = flops_per_token(net, 16, causal=False, probe=plan.probe)
    assert found == flops_per_token(once, 16, causal=False) + 6 * table


def test_mfu_is_model_flops_over_the_peak_of_each_device() -> None:
    speed = Speed(6000, 4, 1e9, 0.75e9, 1e12)
    assert speed.metrics(2.0) == {
        "perf/step_time_s": 2.0,
        "perf/tokens_per_second": 3000.0,
        "perf/tokens_per_second_per_device": 750.0,
        "perf/mfu": 0.75,
        "perf/mfu_causal": 0.5625,
    }
    unknown = dataclasses.replace(speed, peak_flops=None).metrics(2.0)
    assert (unknown["perf/mfu"], unknown["perf/mfu_causal"]) == (None, None)


def test_a_llama_s_flops_are_those_of_its_matmuls_and_of_attention() -> None:
    cfg = config("model=llama2_debug", "parallel=fsdp")
    llama, plan = planned("model=llama2_debug", "parallel=fsdp")
    of = Speed.of(llama, plan, cfg, dataclasses.replace(CPU, name="NVIDIA H100 80GB HBM3"))
    n = sum(p.numel() for p in llama.parameters()) - llama.get_parameter("tok_embeddings.weight").numel()
    layers, width, length = cfg.model.args["n_layers"], cfg.model.args["dim"], cfg.data.seq_len
    assert of.flops_per_token == 6 * n + 12 * layers * width * length
    assert of.causal_flops_per_token == 6 * n + 6 * layers * width * length
    assert (of.tokens_per_step, of.world_size) == (cfg.train.global_batch_size * length, 4)
    assert of.peak_flops == 67e12


def test_the_time_of_a_step_is_without_what_lies_between_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(watch, "time", SimpleNamespace(perf_counter=lambda: now))
    state, timing = Mock(), Timing(CPU.torch, Mock(metrics=lambda s: {"perf/step_time_s": s}), range(4, 5))

    def phase(name: str, seconds: float) -> None:
        nonlocal now
        with timing.phase(name):
            now += seconds

    def step(forward: float, *backward: float, apart: float = 0.0) -> None:
        nonlocal now
        phase("data", 1)
        with timing.step(state):
            phase("forward", forward)
            now += apart
            for seconds in backward:
                phase("backward", seconds)

    def row() -> tuple[float | int | None, ...]:
        found = timing.metrics()
        return tuple(found.get(name) for name in ("perf/step_time_s", "time/data_s", *PARTS))

    timing.start(state)
    now += 1000  # until the first batch is read
    step(2, 3, 1, apart=0.5)
    phase("pause", 10)
    step(4)
    assert row() == (6.25, 1, 3, 2)
    phase("evaluation", 50)
    phase("pause", 50)  # for a checkpoint after the row
    step(2, 1)
    assert row() == (4, 1, 2, 1)
    step(70)  # which a profiler slows down
    assert row() == (None,) * 4
    step(80)
    phase("pause", 1)
    step(2, 2)
    assert row() == (43, 1, 41, 1)


def test_peak_memory_is_in_bytes() -> None:
    found = PeakMemory(CPU).metrics()
    assert 2**26 < (found["memory/peak_bytes"] or 0) < 2**40
    assert found["memory/reserved_bytes"] is None


@pytest.mark.parametrize(("kind", "per_weight"), [(FrozenBlock, 4), (FrozenUpToOutput, 2)])
def test_a_frozen_weight_has_no_gradient_of_its_own_nor_one_to_pass_on(
    kind: type[nn.Module], per_weight: int
) -> None:
    net, plan = planned(*model(kind), "parallel=none")
    block = sum(p.numel() for p in net.get_submodule("mlp").parameters())
    head = net.get_parameter("output.weight").numel()
    assert flops_per_token(net, 16, causal=False, probe=plan.probe) == per_weight * block + 6 * head
