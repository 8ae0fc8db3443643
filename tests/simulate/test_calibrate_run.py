"""A cluster's rates from one measured run: the factor by which the cluster was slower than its base is found again."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tpresearch.api import load
from tpresearch.calibrate import __main__ as calibrate
from tpresearch.calibrate.__main__ import how_to_use
from tpresearch.calibrate.run import cluster_from_run, read_run
from tpresearch.config.errors import ConfigError
from tpresearch.config.world import World
from tpresearch.launch.composition import conf_dir, read_option
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.simulate.depth import recording
from tpresearch.simulate.prediction import predict
from tpresearch.simulate.preflight import preflight
from tpresearch.simulate.run_files import write_run

SLOWER = 0.8


def slower(plain: dict[str, Any], *names: str) -> dict[str, Any]:
    numbers = {name: dict(number) for name, number in plain["numbers"].items()}
    for name in names:
        value = numbers[name]["value"]
        numbers[name]["value"] = [SLOWER * v for v in value] if isinstance(value, list) else SLOWER * value
    return {**plain, "numbers": numbers}


GPU_RATES = (
    "gemm_efficiency",
    "bandwidth_efficiency",
    "attention_tflops_forward",
    "attention_tflops_backward",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The record of a run whose devices have 0.8 of a DGX H100's rates."""
    folder = tmp_path_factory.mktemp("run")
    words = (
        "model=llama2_debug",
        "model.dim=2048",
        "model.n_heads=16",
        "model.n_kv_heads=16",
        "model.ffn_dim=5504",
    )
    words += ("data=random_tokens", "data.seq_len=2048", "train.global_batch_size=8", "train.dtype=bfloat16")
    cfg = load(*words, "parallel=fsdp", "world_size=2", "cluster=h100_dgx", config_name="simulate")
    job = preflight(cfg, World())
    cluster = parse_cluster(slower(read_option("cluster", "h100_dgx"), *GPU_RATES))
    write_run(predict(recording(job.cfg, job.sizes), cluster), folder)
    summary(folder, predicted=False, device="NVIDIA H100 80GB HBM3")
    return folder


def summary(folder: Path, **changes: Any) -> None:
    path = folder / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_factor_between_a_cluster_and_its_base_is_found(run: Path) -> None:
    base = read_option("cluster", "h100_dgx")
    found = cluster_from_run(read_run(run), base, "mine")
    cluster, before = parse_cluster(found), parse_cluster(base)
    for name in GPU_RATES[:2]:
        assert cluster[name] / before[name] == pytest.approx(SLOWER, rel=5e-3)
    for name in GPU_RATES[2:]:
        assert cluster.table(name)[2] / before.table(name)[2] == pytest.approx(SLOWER, rel=5e-3)
    unchanged = set(found["numbers"]) - set(GPU_RATES)
    assert all(found["numbers"][name] == base["numbers"][name] for name in unchanged)
    assert {str(cluster.numbers[name].kind) for name in GPU_RATES} == {"fitted"}
    assert "llama2_debug" in cluster.checked[0]
    assert cluster.name == "mine"


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"predicted": True}, "it is a prediction"),
        ({"perf/step_time_s": None}, "none of its steps was timed"),
        ({"perf/step_time_s": 1e-4}, "which no rates between 0.12 and 1.2 times those of h100_dgx make"),
        ({"perf/step_time_s": 10}, "which no rates"),
        ({"world_size": None}, "not the folder of a run that has ended"),
        ({"world_size": math.inf}, "its world_size is inf"),
        ({"world_size": math.nan}, "its world_size is nan"),
        ({"world_size": 10**400}, "its world_size is 1000"),
        ({"world_size": -2}, "its world_size is -2"),
        ({"world_size": True}, "its world_size is true"),
        ({"world_size": 2.5}, "its world_size is 2.5"),
        ({"world_size": "2"}, "its world_size is 2"),
        ({"perf/step_time_s": 10**400}, "none of its steps was timed"),
        ({"perf/step_time_s": True}, "none of its steps was timed"),
    ],
)
def test_a_run_that_says_nothing_of_the_cluster_is_refused(
    run: Path, tmp_path: Path, changes: dict[str, Any], why: str
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    summary(folder, **changes)
    with pytest.raises(ConfigError, match=rf"^run={folder}: .*{why}"):
        cluster_from_run(read_run(folder), read_option("cluster", "h100_dgx"), "mine")


def test_a_config_with_a_number_beyond_all_floats_is_refused(run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["optimizer"]["lr"] = 10**400
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=rf"^run={folder}: not the folder of a run that has ended"):
        read_run(folder)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not the folder of a run"):
        read_run(tmp_path)


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.yaml").mkdir()
    monkeypatch.setattr(calibrate, "_new_cluster", lambda *_: pytest.fail("it measures"))
    for out, why in [("/proc/mine.yaml", ""), (f"{tmp_path}/mine.yaml", "Is a directory")]:
        monkeypatch.setattr(sys, "argv", ["calibrate", f"out={out}"])
        with pytest.raises(ConfigError, match=rf"^out={out}: cannot be written: {why}"):
            calibrate.main()


def test_it_says_how_the_file_is_used_where_it_is(tmp_path: Path) -> None:
    assert how_to_use(conf_dir() / "cluster" / "here.yaml") == "simulate with cluster=here"
    mine = tmp_path / "mine" / "cluster"
    mine.mkdir(parents=True)
    used = f"simulate with 'hydra.searchpath=[file://{tmp_path}/mine]' cluster=here"
    assert how_to_use(mine / "here.yaml") == used
    assert how_to_use(tmp_path / "here.yaml") == "move it to conf/cluster, and simulate with cluster=here"
