"""Steps of which `calibrate` times every op, and the file that it writes of a machine without a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from support.commands import ROOT, environment, execute_warm

from tpresearch.calibrate.steps import TINY, time_steps
from tpresearch.simulate.cluster import parse_cluster
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
