"""Settings that W&B would refuse are refused before a run; its own variables win where nothing was typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.composed import config

from tpresearch.config.compose import as_dict
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import LoggerConfig
from tpresearch.config.world import World, WrongEnvironment
from tpresearch.track.wandb_host import check_settings, check_sweep
from tpresearch.train.preflight import quick_check

WANDB = {
    "WANDB_PROJECT": "theirs",
    "WANDB_ENTITY": "team",
    "WANDB_RUN_GROUP": "ablation",
    "WANDB_NAME": "first",
    "WANDB_JOB_TYPE": "bench",
    "WANDB_DIR": "/scratch",
}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"project": "a/b"},
            "logger.project=a/b: has / in it; at most 128 characters, and none of # % / : ? \\",
        ),
        ({"project": "p" * 129}, f"logger.project={'p' * 129}: not a valid W&B name"),
        ({"project": ""}, "logger.project=: not a valid W&B name"),
        ({"entity": "a team "}, "logger.entity=a team: not a valid W&B name"),
        ({"entity": "https://wandb.ai/us"}, "logger.entity=https://wandb.ai/us: has / : in it"),
        ({"group": "g" * 129}, f"logger.group={'g' * 129}: not a valid W&B name"),
        ({"name": " "}, "logger.name=: not a valid W&B name"),
        ({"job_type": ""}, "logger.job_type=: not a valid W&B name"),
        (
            {"tags": ["fine", "t" * 65]},
            f"logger.tags={'t' * 65}: W&B does not accept a tag of 65 characters; tags of 1 to 64",
        ),
        ({"tags": [""]}, "logger.tags=: W&B does not accept a tag of 0 characters"),
        ({"run_id": "a:b"}, "WANDB_RUN_ID=a:b: has : in it"),
        ({"run_id": " "}, "WANDB_RUN_ID=: not a valid W&B name"),
    ],
)
def test_what_wandb_would_refuse_is_refused_first(settings: dict[str, Any], says: str) -> None:
    environment = {"WANDB_RUN_ID": settings.pop("run_id", "")}
    with pytest.raises(ConfigError) as refused:
        check_settings(LoggerConfig(**settings), environment)
    assert str(refused.value).startswith(says)


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        ("WANDB_MODE", "foo", "Input should be 'online', 'offline'"),
        ("WANDB_SILENT", "maybe", "Input should be a valid boolean"),
        ("WANDB_BASE_URL", "nonsense", "Input should be a valid URL"),
        ("WANDB_RUN_ID", "a;b", "Run ID cannot contain the characters"),
    ],
)
def test_a_variable_that_wandb_would_refuse_is_to_be_unset(name: str, value: str, legal: str) -> None:
    with pytest.raises(WrongEnvironment) as refused:
        check_settings(LoggerConfig(), {"WANDB_PROJECT": "theirs", name: value})
    assert (refused.value.field, refused.value.given) == (name, [name])
    assert refused.value.legal.startswith(legal)


def test_a_run_of_a_wandb_sweep_trains_what_that_has_drawn(tmp_path: Path) -> None:
    """An agent whose command passes nothing on would record what it has drawn beside runs that are all the same."""
    file = tmp_path / "config-run1.yaml"
    plain, options = as_dict(config("train.seed=5", "parallel=none")), {"parallel": "none"}

    def check(drawn: str, **typed: str) -> None:
        file.write_text(f"wandb_version: 1\n\n{drawn}")
        check_sweep(plain, options, typed, {"WANDB_SWEEP_PARAM_PATH": str(file)})

    check_sweep(plain, options, {}, {"WANDB_SWEEP_PARAM_PATH": str(tmp_path / "gone")})
    check(
        "train.seed:\n  value: 5\noptimizer.lr:\n  value: 3e-3\nparallel:\n  value: none\nnote:\n  value: 1\n"
    )
    check("parallel:\n  value: fsdp\n", parallel="fsdp")
    check("train:\n  value:\n    seed: 5\n")
    for drawn, key, value in (
        ("optimizer.lr:\n  value: 0.5\n", "optimizer.lr", 0.5),
        ("parallel:\n  value: fsdp\n", "parallel", "fsdp"),
        ("train:\n  value:\n    seed: 6\n", "train.seed", 6),
    ):
        with pytest.raises(ConfigError, match="^" + key + r"=.*: the W&B sweep has drawn") as refused:
            check(drawn)
        assert refused.value.fix == {key: value}


def test_what_a_wandb_sweep_has_drawn_is_checked_where_wandb_is_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "drawn.yaml").write_text("wandb_version: 1\n\ntrain.seed:\n  value: 6\n")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "drawn.yaml"))
    cfg = config("train.seed=5", "parallel=none", "logger=wandb")
    with pytest.raises(ConfigError, match=r"^train\.seed=5: the W&B sweep has drawn 6"):
        quick_check(cfg, World())
    cfg.logger.wandb = False
    quick_check(cfg, World())


def test_what_wandb_takes_is_taken() -> None:
    names = LoggerConfig(
        project="p" * 128, entity="us", group="sweeps/2026-11-26/a b", name="[/b] 100 %: why?"
    )
    names.tags = ["t" * 64, "optimizer.lr=0.001"]
    check_settings(names, {"WANDB_RUN_ID": "a1b2"})


def test_wandbs_rules_are_the_clients() -> None:
    """Where the client has a rule of its own, it is this one."""
    from wandb import Settings
    from wandb.errors import UsageError

    Settings(project="p" * 128, run_id="a1b2", run_tags=["t" * 64])
    refused: list[dict[str, Any]] = [
        {"project": "p" * 129},
        {"project": "a:b"},
        {"run_id": "a/b"},
        {"run_tags": ["t" * 65]},
    ]
    for wrong in refused:
        with pytest.raises((UsageError, ValueError)):
            Settings(**wrong)


def test_wandbs_variables_win_where_nothing_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in {**WANDB, "WANDB_TAGS": "one, two,"}.items():
        monkeypatch.setenv(variable, value)
    said = config("logger=wandb").logger
    assert [said.project, said.entity, said.group, said.name, said.job_type, said.dir] == list(WANDB.values())
    assert said.tags == ["one", "two"]
    typed = config("logger=wandb", "logger.project=mine", "logger.tags=[three]", "logger.entity=null").logger
    assert (typed.project, typed.tags, typed.entity, typed.group) == ("mine", ["three"], None, "ablation")
    for variable in (*WANDB, "WANDB_TAGS"):
        monkeypatch.setenv(variable, "")
    assert config("logger=wandb").logger == LoggerConfig()
