"""No credential goes into a record or a message: those known here, those of a known shape, those under such a name."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.trainings import TINY, Start

from tpresearch.config.errors import ConfigError
from tpresearch.config.secrets import refuse_secrets, words_without_secrets

KEY = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("NETRC", "HF_HOME", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password netrc-passw0rd\n")
    (tmp_path / ".netrc").chmod(0o600)
    token = tmp_path / ".cache" / "huggingface" / "token"
    token.parent.mkdir(parents=True)
    token.write_text("a-token-of-this-user\n")
    monkeypatch.setenv("MY_API_KEY", KEY)


@pytest.mark.parametrize(
    ("config", "key", "what"),
    [
        ({"a": {"b": [1, f"x{KEY}"]}}, "a.b", "the value of $MY_API_KEY"),
        ({"a": {KEY: 1}}, "a...", "the value of $MY_API_KEY"),
        ({"url": "u:netrc-passw0rd"}, "url", "the password of api.wandb.ai in the netrc file"),
        ({"t": "a-token-of-this-user"}, "t", "the Hugging Face token of this user"),
        ({"t": "hf_abcdefghijklmnopqrstuv"}, "t", "what looks like a Hugging Face token"),
        ({"t": "https://me:pa55word@host/x"}, "t", "what looks like a password in an address"),
        (
            {"env_set": {"WANDB_API_KEY": KEY[::-1]}},
            "env_set.WANDB_API_KEY",
            "what its name says is a credential",
        ),
    ],
)
def test_a_config_with_a_credential_is_refused_by_its_key(
    config: dict[str, object], key: str, what: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        refuse_secrets(config)
    assert str(refused.value).startswith(
        f"{key}=...: holds {what}, which would be written to the run's record; "
    )


def test_what_is_none_is_not_taken_for_one() -> None:
    refuse_secrets(
        {
            "env_set": {"WANDB_API_KEY": "${oc.env:WANDB_API_KEY}", "A": "layers.*.attention.w[qkv]"},
            "model": {"key_dim": 64, "revision": KEY[::-1]},
            "data": {"path": "https://host/x", "text_field": "token", "max_tokens": 10_000_000_000_000},
        }
    )


def test_words_of_a_command_line() -> None:
    typed = ["train.steps=3", f"name={KEY}", f"+{KEY}=1", "model=toy_mlp"]
    kept, found = words_without_secrets(typed)
    assert kept == ["train.steps=3", "model=toy_mlp"]
    assert found == {"name": "the value of $MY_API_KEY", "...": "the value of $MY_API_KEY"}


@pytest.mark.cli
@pytest.mark.parametrize(
    ("typed", "key"),
    [
        ((f"+hydra.job.env_set.WANDB_API_KEY={KEY[::-1]}",), "hydra.job.env_set.WANDB_API_KEY"),
        ((f"logger.name={KEY}", "train.stepz=3"), "logger.name"),
        (("logger.name=${oc.env:MY_API_KEY}",), "logger.name"),
    ],
)
def test_a_command_does_not_repeat_it(
    train_py: Start, tmp_path: Path, typed: tuple[str, ...], key: str
) -> None:
    done = train_py(*TINY, *typed, MY_API_KEY=KEY)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert done.err.startswith(f"error: {key}=...: holds ")
    assert KEY not in done.err
    assert KEY[::-1] not in done.err
    assert done.command_to_try[0] == "python"
    assert not list((tmp_path / "cwd").iterdir())
