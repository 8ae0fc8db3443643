"""Numbers of a cluster that a file or an override changes: where they are said to come from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from tpresearch.config.compose import register_schema
from tpresearch.launch.composition import conf_dir, files_of_option, initialize_conf, read_option
from tpresearch.launch.resolvers import register_resolvers
from tpresearch.simulate.cluster import Cluster, Number, SourceKind, parse_cluster
from tpresearch.simulate.sources import IN_A_FILE, TYPED, with_own_sources

BASE = read_option("cluster", "h100_dgx")
MINE = {
    "defaults": ["h100_dgx"],
    "name": "mine",
    "numbers": {
        "inter_gb_s": {"value": 25},
        "kernel_us": {"value": 3, "source": "mine"},
        "memory_gb": {"value": BASE["numbers"]["memory_gb"]["value"]},  # as it was
    },
}


def read(folder: Path, option: str, *words: str, **files: object) -> Cluster:
    """The cluster that these files and overrides compose."""
    (folder / "cluster").mkdir()
    for name, content in files.items():
        (folder / "cluster" / f"{name}.yaml").write_text(yaml.safe_dump(content))
    register_schema()
    register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_conf():
        searched = f"hydra.searchpath=[file://{folder}]"
        composed = compose("simulate", overrides=[searched, f"cluster={option}", *words])
        plain: Any = OmegaConf.to_container(composed.cluster, resolve=True)
    return with_own_sources(
        parse_cluster(plain), files_of_option("cluster", option, [conf_dir(), folder]), words
    )


def base_number(name: str) -> Number:
    stated = BASE["numbers"][name]
    return Number(float(stated["value"]), SourceKind(stated["kind"]), stated["source"])


def test_a_number_that_a_file_changes_has_not_the_source_of_the_one_it_replaces(tmp_path: Path) -> None:
    found = read(tmp_path, "mine", mine=MINE)
    label = IN_A_FILE.format("cluster/mine.yaml")
    assert found.numbers["inter_gb_s"] == Number(25, SourceKind.guessed, label)
    assert found.numbers["kernel_us"] == Number(3, SourceKind.fitted, "mine")
    for name in ("memory_gb", "gemm_efficiency"):
        assert found.numbers[name] == base_number(name)
    assert found.checked == tuple(f"before inter_gb_s, kernel_us changed, {line}" for line in BASE["checked"])


def test_a_file_that_states_its_checks_is_believed(tmp_path: Path) -> None:
    child = {"defaults": ["mine"], "name": "child", "numbers": {"inter_gb_s": {"value": 30}}}
    found = read(tmp_path, "child", mine={**MINE, "checked": ["my rows"]}, child=child)
    assert found.checked == ("before inter_gb_s changed, my rows",)
    assert found.numbers["inter_gb_s"].source == IN_A_FILE.format("cluster/child.yaml")


def test_a_number_typed_on_the_command_line_has_not_the_source_of_the_files(tmp_path: Path) -> None:
    words = [
        f"cluster.numbers.{word}"
        for word in ("inter_gb_s.value=25", "kernel_us.value=3", "kernel_us.source=mine")
    ]
    changed = read(tmp_path, "h100_dgx", *words, "cluster.numbers.launch_us={value: 2}")
    assert changed.numbers["inter_gb_s"] == Number(25, SourceKind.guessed, TYPED)
    assert changed.numbers["launch_us"] == Number(2, SourceKind.guessed, TYPED)
    assert changed.numbers["kernel_us"] == Number(3, SourceKind.fitted, "mine")
    before = "before inter_gb_s, kernel_us, launch_us changed, "
    assert changed.checked == tuple(before + line for line in BASE["checked"])


def test_checks_of_other_hosts_are_said_to_be_of_those(tmp_path: Path) -> None:
    few = {"defaults": ["h100_dgx"], "name": "few", "devices_per_host": 4, "has_switch": True}
    found = read(tmp_path, "few", "cluster.shared_cores=2", few=few)
    before = "before devices_per_host, shared_cores changed, "
    assert found.checked == tuple(before + line for line in BASE["checked"])


def test_a_number_that_another_config_file_changes_is_guessed(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    experiment = {"cluster": {"numbers": {"inter_gb_s": {"value": 25}}}}
    text = "# @package _global_\n" + yaml.safe_dump(experiment)
    (tmp_path / "experiment" / "slow.yaml").write_text(text)
    found = read(tmp_path, "h100_dgx", "experiment=slow")
    assert found.numbers["inter_gb_s"].source == IN_A_FILE.format("another config file")
    assert all(line.startswith("before inter_gb_s changed, ") for line in found.checked)


@pytest.mark.parametrize("path", sorted((conf_dir() / "cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_our_own_files_state_the_source_of_each_number_they_change(path: Path, tmp_path: Path) -> None:
    found = read(tmp_path, path.stem)
    assert all("states no source" not in number.source for number in found.numbers.values())
    assert not any(line.startswith("before ") for line in found.checked)
