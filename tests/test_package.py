"""The wheel, installed into an empty folder: its commands run from any other, with the config files that it carries."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import ROOT, Done, environment, execute

Installed = Callable[..., Done]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install` makes of the wheel that `pip wheel` builds."""
    dist, site = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("site")
    outside = environment(PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    build = f"import hatchling.build; hatchling.build.build_wheel({str(dist)!r})"
    built = execute([sys.executable, "-c", build], ROOT, outside)
    assert built.code == 0, built.err
    install = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(site)]
    installed = execute([sys.executable, *install, *map(str, dist.glob("*.whl"))], dist, outside)
    assert installed.code == 0, installed.err
    return site


@pytest.fixture
def tpresearch(site: Path, tmp_path: Path) -> Installed:
    """`tpresearch WORDS` in an empty folder."""

    def run(*words: str) -> Done:
        env = environment(tmp_path, PYTHONPATH=str(site))
        return execute([str(site / "bin/tpresearch"), *words], tmp_path, env)

    return run


def test_the_wheel_has_every_config_file_and_nothing_of_the_users(site: Path) -> None:
    kept = {path.relative_to(ROOT) for path in (ROOT / "conf").rglob("*.yaml")}
    carried = {path.relative_to(site / "tpresearch") for path in (site / "tpresearch/conf").rglob("*.*")}
    assert carried == {path for path in kept if path.parts[1] != "local"}
    assert not (site / "tests").exists()
    assert not (site / "train.py").exists()


@pytest.mark.parametrize("version", [(3, 10), (3, 15)])
def test_a_python_that_torch_has_no_build_for_is_refused_before_anything_is_made(
    version: tuple[int, int], tmp_path: Path
) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    python = tmp_path / "other_python"
    pretend = f"import sys; sys.version_info = {version}; exec(sys.argv[1])"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{pretend}" "$2"\n')
    python.chmod(0o755)
    done = execute(["make", "setup", f"PYTHON={python}"], tmp_path, environment(tmp_path))
    said, *_ = done.err.splitlines()
    major, minor = version
    needs = "torch needs 3.11 to 3.14; try: make PYTHON=python3.13"
    assert said == f"{python} is Python {major}.{minor}, and {needs}"
    assert not (tmp_path / ".venv").exists()


@pytest.mark.cli
def test_a_command_of_the_wheel_runs_from_any_folder(tpresearch: Installed) -> None:
    done = tpresearch("train", "plan_only=true", "model=toy_mlp", "parallel=tp", "mesh.tp=2")
    assert done.code == 0, done.err
    assert "mlp.in_proj.weight   in_proj (colwise)   tp: Shard(0)  128x64" in done.out


@pytest.mark.cli
def test_a_model_of_ones_own_is_found_in_the_folder_where_a_command_starts(
    tpresearch: Installed, tmp_path: Path
) -> None:
    mine = "from tpresearch.models.toy_mlp import ToyLM\n\n\nclass Mine(ToyLM): ...\n"
    (tmp_path / "mine.py").write_text(mine)
    done = tpresearch("train", "plan_only=true", "model=toy_mlp", "model._target_=mine.Mine", "parallel=none")
    assert done.code == 0, done.err
    assert "mlp.in_proj.weight" in done.out


@pytest.mark.cli
def test_only_commands_that_are_there_are_listed_and_others_refused(tpresearch: Installed) -> None:
    done = tpresearch("--help")
    listed = [line.split()[0] for line in done.out.splitlines() if line.startswith("  ")]
    assert {"train", "verify", "compare", "prepare", "dashboard"} <= set(listed)
    for name in listed:
        assert (ROOT / f"tpresearch/{name}.py").exists() or (ROOT / f"tpresearch/{name}/__main__.py").exists()
    assert 'eval "$(tpresearch completion)"' in done.out
    assert tpresearch("completion").out == (ROOT / "tpresearch/completion.bash").read_text()
    refused = tpresearch("trian", "model=toy_mlp")
    assert refused.code == 2
    assert refused.err.startswith("error: command=trian: no such command; one of train verify ")
    assert refused.err.endswith("; try: tpresearch train --help\n")


@pytest.mark.cli
def test_a_refusal_names_a_command_that_works_from_any_folder(tpresearch: Installed) -> None:
    done = tpresearch("train", "train.steps=0")
    assert done.code == 2
    assert done.command_to_try[:4] == ["torchrun", "--nproc-per-node=4", "-m", "tpresearch.train"]
