"""What Hydra's own command line offers keeps working, and a run leaves what it should."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from support.commands import environment, execute_warm
from support.launches import Command

from tpresearch import agent, dashboard, export
from tpresearch.__main__ import COMMANDS
from tpresearch.config.errors import ConfigError
from tpresearch.config.world import World
from tpresearch.launch.command import Command as TypedCommand
from tpresearch.launch.command import corrected, override, program_words
from tpresearch.launch.help import help_of_options, meanings
from tpresearch.launch.hydra_app import typed_words
from tpresearch.launch.options import command, read_options
from tpresearch.verify.ranks import Ranks

pytestmark = pytest.mark.cli


def test_a_run_leaves_its_config_and_logs_in_a_dated_folder(warm_python: Command, tmp_path: Path) -> None:
    done = warm_python("train.steps=3", "model=toy_mlp")
    assert done.code == 0
    folder = Path(done.folders[0])
    assert re.fullmatch(r"outputs/train/\d{4}-\d\d-\d\d/\d\d-\d\d-\d\d", str(folder.relative_to(tmp_path)))
    assert sorted(path.name for path in folder.iterdir()) == [".hydra", ".lock", "ranks", "train.log"]
    assert [path.name for path in (folder / "ranks").iterdir()] == ["rank-00000.log"]
    assert yaml.safe_load((folder / ".hydra" / "config.yaml").read_text())["train"]["steps"] == 3
    assert yaml.safe_load((folder / ".hydra" / "hydra.yaml").read_text())["hydra"]["run"]["dir"] == str(
        folder.relative_to(tmp_path)
    )
    assert "rank 0 of 1 ['train.steps=3', 'model=toy_mlp'] toy_mlp" in done.out


def test_a_folder_that_is_given_is_used_as_it_is_and_again(warm_python: Command, tmp_path: Path) -> None:
    for _ in range(2):
        assert warm_python("hydra.run.dir=mine/${name}").folders == [str(tmp_path / "mine" / "train")]
    assert (tmp_path / "mine" / "train" / "train.log").read_text().count("training llama2_tiny") == 2


def test_showing_a_config_makes_no_folder(warm_python: Command, tmp_path: Path) -> None:
    shown = warm_python("train.steps=3", "--cfg", "job")
    assert yaml.safe_load(shown.out)["train"]["steps"] == 3
    assert "hydra" in yaml.safe_load(warm_python("--cfg", "all", "--resolve").out)
    assert "Defaults List" in warm_python("--info", "defaults").out
    assert not list(tmp_path.iterdir())


def test_help_says_the_groups_and_what_each_key_means(warm_python: Command, tmp_path: Path) -> None:
    done = warm_python("--help", "train.steps=7")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert (
        "  parallel                                  ddp, fsdp, fsdp_tp, hsdp, hsdp_tp, none, sp, tp" in lines
    )
    assert any(line.startswith("  train.steps=7  ") and "Optimizer steps" in line for line in lines)
    assert any(line.startswith("  schedule.name=cosine  ") and "constant, cosine" in line for line in lines)
    assert not any(line.startswith("  cluster ") for line in lines)  # a group that train does not compose
    assert len(lines) < 150
    assert max(map(len, lines[3:])) <= 140
    assert not list(tmp_path.iterdir())


def test_every_key_has_a_meaning() -> None:
    assert [key for key, meaning in meanings().items() if not meaning] == []
    assert len(meanings()) > 75


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_answers_help(ranks: Ranks, tmp_path: Path, name: str) -> None:
    words = ["-m", f"tpresearch.{name}", "--help"]
    done = execute_warm(ranks, None, words, tmp_path, environment(tmp_path))
    assert (done.code, done.err) == (0, "")
    assert f"tpresearch.{name}" in done.out
    assert not list(tmp_path.iterdir())


def test_options_are_shown_with_their_defaults_and_refused_with_what_they_take() -> None:
    lines = help_of_options(dashboard.Options).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  report=")] == ["report=true"]
    assert [line.split()[0] for line in lines if line.startswith("  group=")] == ["group="]
    for word, said in [
        ("report=maybe", "report=maybe: of the wrong type; true or false"),
        ("report=null", "report=null: it cannot be null; a value"),
    ]:
        with pytest.raises(ConfigError, match=said):
            read_options(dashboard.Options, ["group=x", word])
    with pytest.raises(ConfigError, match="dtype=fp8: no such choice; one of float32, bfloat16, "):
        read_options(export.Options, ["checkpoint=x", "out=y", "dtype=fp8"])


def test_config_files_can_be_added(warm_python: Command, extra_configs: str) -> None:
    by_override = warm_python(extra_configs, "experiment=short", "--cfg", "job")
    by_flag = warm_python("experiment=short", "--config-dir", "mine", "--cfg", "job")
    assert (
        yaml.safe_load(by_override.out)["train"]["steps"]
        == yaml.safe_load(by_flag.out)["train"]["steps"]
        == 7
    )
    assert "one of short, torn" in warm_python("experiment=sort", "--config-dir", "mine").err


def test_a_proposed_command_gives_every_option_that_is_required(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["export", "checkpoint=nowhere", "out=there"])
    with pytest.raises(SystemExit):
        command(export.main, export.Options)
    assert capsys.readouterr().err.rstrip().endswith("out=there 'checkpoint=<checkpoint>'")


def test_ctrl_c_ends_a_command_in_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sys.argv", ["export"])
    with pytest.raises(SystemExit, match=r"^130$"):
        command(stopped)
    assert capsys.readouterr().err == "stopped by SIGINT\n"


@pytest.mark.parametrize(
    ("typed", "options"),
    [
        (
            "--nnodes=2 --nproc-per-node=4 --node-rank=1 --master-addr=10.0.0.1",
            "--nnodes=2 --node-rank=1 --master-addr=10.0.0.1",
        ),
        ("--nnodes 2 --rdzv-endpoint=a:29500 --nproc_per_node 4", "--nnodes 2 --rdzv-endpoint=a:29500"),
        ("--nnodes=2 --rdzv-id='my job' --nproc-per-node=gpu -m", "--nnodes=2 '--rdzv-id=my job'"),
        ("", "--nnodes=2"),  # where PET_NNODES says it
    ],
)
def test_a_proposed_command_says_how_hosts_meet_as_it_was_typed(
    monkeypatch: pytest.MonkeyPatch, typed: str, options: str
) -> None:
    words = [*shlex.split(typed), "tpresearch.train", "--nnodes=3"]
    monkeypatch.setenv(agent.TORCHRUN_OPTIONS, agent.typed_options(words))
    monkeypatch.setattr("sys.argv", ["train.py", "train.steps=3"])
    after = f"--nproc-per-node=4 {shlex.join(program_words())} train.steps=3"
    assert str(TypedCommand.from_argv(World(0, 8, 0, 4, elastic=True))) == f"torchrun {options} {after}"
    assert str(TypedCommand.from_argv(World(0, 4, 0, 4, elastic=True))) == f"torchrun {after}"


@pytest.mark.parametrize(
    "text",
    [
        *("a b", "it's", "a\\b c", "a\\", "a\\'", "\\\\'\\", "'", '"', "#é=[,]{}", "a\\\n"),
        *("1e5", "1_000", "1.10", "-.5", "12", "true", "Null", "nan"),
    ],
)
def test_hydra_reads_a_quoted_value_as_it_was(text: str) -> None:
    assert OverridesParser.create().parse_override(override("key", text)).value() == text


def test_a_command_is_repeated_without_a_key_and_what_is_below_it() -> None:
    words = ("model=x", "model.dim=3", "+model.dim.more=1", "~model", "model.dimm=2", "~other")
    assert TypedCommand(words).without("model.dim").arguments == ("model=x", "model.dimm=2", "~other")


def test_an_interpolation_that_was_typed_is_repeated_as_it_is() -> None:
    words = ["model.dim=${.hidden_dim}", "name=${not.there}", "data.path=${oc.env:HOME}/x"]
    assert typed_words(OmegaConf.create(words)) == words


def test_a_path_in_a_proposed_override_is_quoted_for_hydra() -> None:
    assert corrected(["resume=x"], {"resume": None, "init_from": Path("a b/c")}) == ["init_from='a b/c'"]
