"""Steps of which `calibrate` times every op, and the file that it writes of a machine without a GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import yaml
from support.commands import ROOT, environment, execute_warm

from tpresearch.calibrate import cpu
from tpresearch.calibrate.rows import measured_number
from tpresearch.calibrate.steps import TINY, StepTimes, time_steps
from tpresearch.ledger.entries import Event
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.simulate.trace import Op
from tpresearch.verify.ranks import Ranks


@pytest.mark.parametrize(("plan", "issuer", "collectives"), [("fsdp", "fsdp", 12), ("sp", "dtensor", 28)])
def test_each_op_of_a_step_has_its_time(ranks: Ranks, plan: str, issuer: str, collectives: int) -> None:
    """Three blocks: seven matmuls each, forward and twice backward, and the output's three; collectives as the ledger's
    formulas have them."""
    found = ranks.run(2, time_steps, plan, TINY)[0]
    assert sum(op.kind == "gemm" for op, _ in found.ops) == 3 * (3 * 7 + 1)
    assert found.count(issuer) == collectives
    assert all(seconds > 0 for _, seconds in found.ops)
    assert 0 < found.ops_s < found.wall_s
    assert found.step_s < found.wall_s  # it waits for the other rank


@pytest.mark.exhaustive
def test_a_cpu_is_calibrated(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "here.yaml"
    words = ["-m", "tpresearch.calibrate", f"out={path}"]
    done = execute_warm(ranks, None, words, tmp_path, environment(tmp_path, PYTHONPATH=str(ROOT)))
    assert done.code == 0, done.err
    here = parse_cluster(yaml.safe_load(path.read_text()))
    assert here.shared_cores
    assert here["peak_tflops_float64"] < here["peak_tflops_float32"]
    assert here.table("attention_tflops_forward")[0] < here.table("attention_tflops_forward")[-1]
    assert here["launch_us"] < here["tensor_host_us"]


def op(kind: str, name: str, reads: int, writes: int = 0, shape: tuple[int, ...] = ()) -> Op:
    return Op("forward", kind, name, ((0, reads),), ((1, writes),), 4, shape, None, -1)


def collective(name: str, issuer: str = "fsdp") -> Op:
    event = Event("dp_shard", "forward", issuer, name, 2 * 10**9, 2)
    return op("collective", name, 0)._replace(event=event)


def test_rates_are_of_the_time_beyond_that_of_a_small_op() -> None:
    large = 1 << 20
    timed = [
        (op("other", "exp", 8), 1.0),
        (op("gemm", "mm", 0, shape=(2, 10, 10, 10)), 3.0),
        (op("other", "exp", large, large), 5.0),
        (op("other", "chunk_cat", large, large), 3.0),
        (op("optimizer", "_fused_adamw_", 4 * large), 8.0),
    ]
    assert cpu._rates(timed) == (4000 / 2, 2 * large / 4, large / 2, 7 * large / 7)


def test_a_link_s_time_is_of_its_steps_bytes_and_copies_and_ranks_wait_for_the_rest() -> None:
    """Of two ranks, which each send half of 2 GB in a pass, at 1 GB/s, and copy 4 GB at 2 GB/s."""
    link = cpu.Link(1e9, 0.5, 1.0, 2e9)
    times = {"all_reduce": 2 * 1.5, "all_gather": 1.5 + 2, "reduce_scatter": 2 * 1.5 + 2}
    for name, seconds in times.items():
        event = collective(name).event
        assert event
        assert link.seconds(event) == pytest.approx(seconds)
    timed = [
        (collective("all_gather"), 0.5),
        (op("other", "exp", 8), 1.0),
    ]  # of 3.5 s it works on half a second itself
    steps = [StepTimes(timed, 4.0, wall, 2.0) for wall in (9.0, 7.8, 7.0)]
    assert cpu._wait_share(steps, link) == pytest.approx(0.2)
    assert cpu._wait_share(steps[2:], cpu.Link(1e8, 0.5, 1.0, 2e9)) == 0.0


def test_the_host_s_time_per_collective_is_what_its_ops_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten tiny ops take a second; of 4 s in Python, those of a step's 20 ops take 2."""
    exp = (op("other", "exp", 8), 0.0)
    tiny = StepTimes([exp] * 10, 1.0, 1.0, 0.0)
    monkeypatch.setattr(Ranks, "run", lambda *_: [tiny])

    def step(issuer: str, count: int, step_s: float) -> StepTimes:
        return StepTimes(
            [*[(collective("all_gather", issuer), 0.0)] * count, *[exp] * (20 - count)], step_s, 9.0, 1.0
        )

    steps = {"fsdp": step("fsdp", 4, 5.0), "tp": step("dtensor", 2, 4.0), "sp": step("dtensor", 6, 6.0)}
    wanted = {"launch_us": 0.1e6, "collective_host_us": 0.5e6, "tensor_host_us": (1 + 3) / 8 * 1e6}
    assert cpu._host_times(steps) == pytest.approx(wanted)


def test_half_depth_follows_from_a_short_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    """64 long at a quarter of the rate: as long as 256."""
    monkeypatch.setattr(cpu, "_matmul_flops", lambda dtype, depth: {64: 25.0}[depth])
    assert cpu._half_depth(100.0) == 192
    assert cpu._half_depth(20.0) == 0
    assert cpu._extend_to_lengths([1, 2, 3, 4, 5]) == [1, 2, 3, 4, 5, 5, 5, 5]


def test_what_is_measured_of_a_cpu_becomes_the_numbers_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = StepTimes(
        [(collective("all_gather"), 0.0), (collective("all_gather", "dtensor"), 0.0)], 1.0, 12.0, 1.0
    )

    def run(_: Ranks, ranks: int, measure: object, *given: object) -> list[object]:
        return [timed if measure is time_steps else cpu.Link(3e9 / ranks, ranks * 1e-3, 0.25, 2e9)]

    alone = {torch.float32: 1e11, torch.bfloat16: 3e11, torch.float64: 5e10}
    monkeypatch.setattr(Ranks, "run", run)
    monkeypatch.setattr(cpu, "_rates", lambda ops: cpu.Rates(8e10, 1e10, 5e9, 2e10))
    monkeypatch.setattr(cpu, "_matmul_flops", lambda dtype, depth=768: alone[dtype])
    rates = {128: (4e10, 2e10), 16: (1e10, 2.5e9)}
    monkeypatch.setattr(cpu, "_attention_flops", lambda length, width: rates[width])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2})
    numbers = {name: measured_number(value, "a test") for name, value in cpu.measure_cpu().items()}
    here = parse_cluster({"name": "here", "device": "a core", "devices_per_host": 8, "numbers": numbers})
    told = {name: here[name] for name in numbers if not name.startswith("attention_tflops")}
    assert told == pytest.approx(
        told  # what is constant, and memory
        | {"peak_tflops_float32": 0.08, "peak_tflops_bfloat16": 0.24, "peak_tflops_float64": 0.04}
        | {"bandwidth_gb_s": 10, "optimizer_efficiency": 2, "copy_efficiency": 0.5}
        | {"attention_narrow_heads": 0.5, "gemm_half_depth": 0, "launch_us": 0.5e6}
        | {"intra_gb_s": 1.5, "inter_gb_s": 1.5, "overlap_slowdown": 0.25}
        | {"intra_step_us": 6e3 * 3 / 6}  # of six ranks on three cores
        | {"scale_slowdown": 12 - 2 * (2e-3 + 1 / 1.5 + 2) - 1}
    )
    assert here.table("attention_tflops_forward") == pytest.approx((0.12,) * 8)
    assert here.table("attention_tflops_backward") == pytest.approx((0.06,) * 8)
