"""What `~` stands for where HOME is empty, and where there is no home folder, nor any folder to work in."""

from __future__ import annotations

import os
import pwd
import tempfile
from pathlib import Path

import pytest

from tpresearch.config.secrets import words_without_secrets
from tpresearch.config.world import World
from tpresearch.launch.command import WrongCommand
from tpresearch.launch.home import check_home


@pytest.mark.parametrize("empty", [True, False])
def test_an_empty_home_is_none(monkeypatch: pytest.MonkeyPatch, empty: bool) -> None:
    monkeypatch.setenv("HOME", "")
    if not empty:
        monkeypatch.delenv("HOME")
    check_home(World())
    assert Path("~").expanduser() == Path(pwd.getpwuid(os.getuid()).pw_dir)


def test_a_folder_that_was_deleted_is_none_to_work_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    monkeypatch.setenv("PWD", "/gone")
    check_home(World())
    (tmp_path / "gone").rmdir()
    with pytest.raises(WrongCommand, match=r"^PWD=/gone: this folder was deleted"):
        check_home(World())
    monkeypatch.chdir(tmp_path)


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("sys.argv", ["train.py", "parallel=tp"])
    assert words_without_secrets(["parallel=tp"]) == (["parallel=tp"], {})
    with pytest.raises(WrongCommand, match=r"^HOME=: this user has no home folder") as refused:
        check_home(World(0, 2, 0, 2, elastic=True))
    assert str(refused.value.command).startswith(
        f"env HOME={tempfile.gettempdir()}/home-{os.getuid()} torchrun "
    )
    assert str(refused.value.command).endswith(" parallel=tp")
    monkeypatch.setenv("HOME", "/mine")
    check_home(World())
