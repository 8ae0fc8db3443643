"""The measurements of a GPU, rehearsed on the CPU with small sizes: all that CUDA itself adds is a clock."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tpresearch.calibrate import cuda
from tpresearch.calibrate.rows import cluster_from_rows
from tpresearch.launch.composition import read_option
from tpresearch.simulate.cluster import parse_cluster

BASE = read_option("cluster", "h200_dgx")
NUMBERS = (
    *("memory_gb", "gemm_efficiency", "bandwidth_efficiency", "optimizer_efficiency", "copy_efficiency"),
    *("attention_tflops_forward", "attention_tflops_backward", "launch_us"),
)


class Event:
    """An event on a clock that each event moves by a millisecond, and each backward."""

    now = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.now += 1
        self.at = Event.now

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        "TOKENS": 32,
        "WIDTH": 16,
        "HIDDEN": 48,
        "HEADS": 2,
        "HEAD_DIM": 16,
        "ATTENTION": ((2, 1024),),
        "PARAMETERS": 64,
        "COPIED_BYTES": 256,
        "LOAD_SIZE": 16,
        "LOAD_S": 0.01,
    }
    for name, size in sizes.items():
        monkeypatch.setattr(cuda, name, size)
    card = SimpleNamespace(name="NVIDIA H200", total_memory=150_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    backward = torch.autograd.grad

    def slow_backward(*given: Any) -> Any:
        Event.now += 1
        return backward(*given)

    monkeypatch.setattr(torch.autograd, "grad", slow_backward)


@pytest.mark.usefixtures("small")
def test_a_gpu_has_each_number_that_it_can_tell(capsys: pytest.CaptureFixture[str]) -> None:
    rows = cuda.measure_gpu("cpu")
    assert [row["us"] for row in rows[1:]] == [1000] * 4 + [2000] + [1000] * 4
    found = cluster_from_rows(rows, BASE, "here")
    parse_cluster(found)
    measured = {name for name, number in found["numbers"].items() if "calibrate" in number["source"]}
    assert measured == set(NUMBERS)
    assert len(capsys.readouterr().out.splitlines()) == len(rows) - 1


@pytest.mark.usefixtures("small")
def test_an_op_that_fails_leaves_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nOther processes hold it.")

    monkeypatch.setattr(F, "scaled_dot_product_attention", full)
    rows = cuda.measure_gpu("cpu")
    failed = [row for row in rows if "error" in row]
    assert [row["op"] for row in failed] == ["attention forward", "attention forward and backward"]
    assert {row["error"] for row in failed} == {"CUDA out of memory."}
    assert "attention forward 2x2x2x1024x16: failed: CUDA out of memory." in capsys.readouterr().out
    found = cluster_from_rows(rows, BASE, "here")["numbers"]
    assert found["attention_tflops_forward"] == BASE["numbers"]["attention_tflops_forward"]
    assert found["gemm_efficiency"]["kind"] == "measured"
