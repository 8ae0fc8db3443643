"""profiler=trace: the steps that were asked for, on each rank, with time by class of kernel; nothing of it when it is off."""

from __future__ import annotations

import gzip
import json
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.assembled import assembled, joined
from support.composed import config, corpus

from tpresearch.config import Config, ConfigError
from tpresearch.config.schema import ProfilerConfig
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.train.assemble import assemble
from tpresearch.train.main import build_observers
from tpresearch.train.observe import Observer
from tpresearch.train.profile import Profiler, kernel_class, summarize
from tpresearch.verify.ranks import Ranks


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTN", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matmul"),
        ("aten::mm", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma", "attention"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu", "attention"),
        ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL", "collective"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("triton_poi_fused_mul_silu_3", "pointwise"),
    ],
)
def test_a_kernel_is_known_by_its_name(kernel: str, kind: str) -> None:
    assert kernel_class(kernel) == kind


def event(name: str, kind: str, micros: float, annotation: bool = False) -> Any:
    return SimpleNamespace(
        key=name,
        device_type=getattr(torch.autograd.DeviceType, kind),
        is_user_annotation=annotation,
        self_device_time_total=micros if kind == "CUDA" else 0.0,
        self_cpu_time_total=micros if kind == "CPU" else 0.0,
        count=2,
    )


def test_a_disk_that_takes_no_profile_ends_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profiler").touch()
    profiler = Profiler(ProfilerConfig(first_step=3, steps=1), tmp_path / "profiler", 0, False)
    with assembled(config("model=toy_mlp", "parallel=none", "train.steps=4"), watching=[profiler]) as loop:
        for _ in range(4):
            loop.step()
    assert [record.message for record in caplog.records] == ["the profile cannot be written: File exists"]


def test_on_cuda_kernels_alone_are_summed_and_not_the_ranges_around_them() -> None:
    ranges = ("forward", "Optimizer.step#AdamW.step", "## Call CompiledFxGraph abc ##")
    events = [
        *(event(name, "CPU", 5000.0, annotation=True) for name in ranges),
        event("aten::mm", "CPU", 300.0),
        event("cudaLaunchKernel", "CPU", 100.0),
        event("triton_poi_fused_mul_0", "CPU", 50.0),
        *(event(name, "CUDA", 9000.0) for name in ranges),
        event("nvjet_tst_NTN", "CUDA", 4000.0),
        event("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "CUDA", 2000.0),
        event("triton_poi_fused_mul_0", "CUDA", 1000.0),
        event("Memcpy HtoD (Pinned -> Device)", "CUDA", 500.0),
        event("sm90_xmma_gemm", "CUDA", 0.0),
    ]
    found = summarize(events, on_cuda=True, steps=2)
    assert {name: row["ms"] for name, row in found["classes"].items()} == {
        "matmul": 2.0,
        "optimizer": 1.0,
        "pointwise": 0.5,
        "copy": 0.25,
    }
    assert {row["calls"] for row in found["classes"].values()} == {1.0}
    assert len(found["slowest"]) == 4
    assert found["slowest"][0] == {"name": "nvjet_tst_NTN", "ms": 2.0, "calls": 1.0}


def profiled(world: World, cfg: Config, folder: Path) -> None:
    with assembled(cfg, world, watching=[Profiler(cfg.profiler, folder, world.rank, False)]) as loop:
        for _ in range(6):
            loop.step()


def test_each_rank_writes_the_steps_asked_for(ranks: Ranks, tmp_path: Path) -> None:
    words = "model=llama2_debug", "parallel=tp", "profiler=trace", "profiler.first_step=3", "profiler.steps=2"
    ranks.run(2, profiled, config(*words), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("kernels-rank0.json", "kernels-rank1.json", "trace-rank0.json.gz", "trace-rank1.json.gz")
    ]
    for rank in range(2):
        events = json.loads(gzip.decompress((tmp_path / f"trace-rank{rank}.json.gz").read_bytes()))[
            "traceEvents"
        ]
        marked = [e["name"] for e in events if e.get("cat") == "user_annotation"]
        assert marked.count("forward") == marked.count("optimizer") == 2
        found = json.loads((tmp_path / f"kernels-rank{rank}.json").read_text())
        assert {"matmul", "attention", "collective", "optimizer", "pointwise"} <= found["classes"].keys()
        assert all(row["ms"] > 0 for row in found["classes"].values())


def test_what_the_profiler_takes_is_in_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that one second of each step, and an hour of the profiler's, move."""
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def hours(self: Profiler, *_: object) -> None:
        nonlocal now
        now += 3600

    class Work(Observer):
        def phase(self, name: str) -> AbstractContextManager[object]:
            nonlocal now
            now += name == "forward"
            return nullcontext()

    monkeypatch.setattr(Profiler, "_start", lambda self: (hours(self), setattr(self, "_profile", self)))
    monkeypatch.setattr(Profiler, "_stop", lambda self, _: (hours(self), setattr(self, "_profile", None)))
    monkeypatch.setattr("tpresearch.train.profile.record_function", lambda name: nullcontext())
    settings = ("profiler=trace", "profiler.first_step=3", "train.steps=6", "train.eval_rows=0")
    cfg = config("model=toy_mlp", "parallel=none", "train.log_every=2", *settings)
    with joined(cfg) as (job, mesh, device):
        profiler = Profiler(cfg.profiler, tmp_path, 0, False)
        watching = [*build_observers(job, mesh, device, None), profiler, Work()]
        loop = assemble(job, mesh, device, corpus(), watching)
        rows = list(loop.rows())
    assert now == 6 + 2 * 3600
    assert [row.get("perf/step_time_s") for row in rows] == [1.0, None, 1.0]
    assert [row.get("time/forward_s") for row in rows] == [1.0, None, 1.0]


def test_steps_that_the_run_has_not_are_refused() -> None:
    with pytest.raises(
        ConfigError, match="the run ends after step 10, and step 11 would be the last profiled"
    ):
        validate(config("model=toy_mlp", "parallel=none", "profiler=trace", "train.steps=10"), 1)


def test_it_is_off_unless_asked_for() -> None:
    assert config("model=toy_mlp").profiler == ProfilerConfig()
