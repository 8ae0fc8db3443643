"""The real W&B client against a server on loopback: a run arrives there whole."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.arrivals import logged, only_run, said, sync
from support.example_run import STEPS, log_steps, row, train
from support.fake_wandb import DUMMY_KEY, ENTITY, FakeWandb

from tpresearch.config import Config
from tpresearch.config.compose import as_dict
from tpresearch.config.schema import LoggerConfig, WandbMode
from tpresearch.launch.stop import Stopped
from tpresearch.track.names import NAMES
from tpresearch.track.record import read_metrics, read_summary
from tpresearch.track.tracker import Tracker
from tpresearch.track.wandb_files import (
    BLOCK_BYTES,
    FILE_HEADER,
    FULL,
    LAST,
    PART_HEADER,
    cut_half_record,
    parts_of,
    read_records,
    rows_on_disk,
)
from tpresearch.track.wandb_run import WandbRun


def test_what_arrives_is_what_the_record_holds(
    track: Callable[..., Tracker],
    server: FakeWandb,
    cfg: Config,
    run_dir: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    cfg.logger.tags = ["mine", "cpu"]
    with track() as tracker:
        log_steps(tracker)
        print("said by the loop")
    arrived = only_run(server)
    assert logged(arrived) == read_metrics(run_dir)
    assert all(set(r) == set(NAMES) for r in logged(arrived))
    theirs = arrived.config.pop("_wandb")
    assert arrived.config == {key: value for key, value in as_dict(cfg).items() if value != {}}
    assert {"1": "train/tokens"}.items() <= theirs["m"][1].items()  # every chart is drawn over tokens
    assert (arrived.project, arrived.group, arrived.job_type) == ("tpresearch", "train", "train")
    assert arrived.display_name == "llama2_tiny/fsdp2-tp2"
    assert sorted(arrived.tags) == sorted(["fsdp_tp", "llama2_tiny", "cpu", "float32", "mine"])
    assert arrived.exit_code == 0
    defined = {name: value for name, value in read_summary(run_dir).items() if value is not None}
    assert defined.items() <= arrived.summary.items()
    assert arrived.console == []
    assert not {name for name in arrived.files if name.endswith((".py", ".patch", ".diff"))}
    assert tracker._wandb is not None
    assert tracker._wandb.page_or_sync_command() == f"{server.url}/{ENTITY}/tpresearch/runs/{arrived.name}"
    assert capsys.readouterr() == ("said by the loop\n", "")  # the client says nothing on its own


def test_the_client_is_silent_where_it_can_keep_no_log_of_its_own(
    track: Callable[..., Tracker],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file/cache"))
    monkeypatch.setenv("WANDB_CACHE_DIR", "")  # restored afterwards
    monkeypatch.delenv("WANDB_CACHE_DIR")
    with track() as tracker:
        log_steps(tracker)
    assert capfd.readouterr() == ("", "")


def test_the_config_says_project_group_entity_name_and_job(
    track: Callable[..., Tracker], server: FakeWandb, cfg: Config
) -> None:
    cfg.logger = LoggerConfig(project="study", entity=ENTITY, group="ablation", name="a", job_type="bench")
    track().finish()
    arrived = only_run(server)
    assert (arrived.project, arrived.group, arrived.display_name) == ("study", "ablation", "a")
    assert arrived.job_type == "bench"


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_no_key_is_written_anywhere(
    track: Callable[..., Tracker], server: FakeWandb, cfg: Config, run_dir: Path, mode: str
) -> None:
    cfg.logger.mode = WandbMode(mode)
    with track() as tracker:
        log_steps(tracker)
    files = [path for path in run_dir.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert not [path for path in files if DUMMY_KEY.encode() in path.read_bytes()]
    assert DUMMY_KEY not in str([vars(r) for r in server.runs.values()])


def test_a_key_in_netrc_is_a_key(
    track: Callable[..., Tracker], server: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    netrc = Path(os.environ["NETRC"])
    netrc.write_text(f"machine {server.url.removeprefix('http://')} login user password {DUMMY_KEY}\n")
    netrc.chmod(0o600)
    track().finish()
    assert only_run(server).exit_code == 0


@pytest.mark.parametrize(("asked", "folders"), [("offline", 1), ("disabled", 0)])
def test_auto_does_what_the_environment_asks(
    track: Callable[..., Tracker],
    server: FakeWandb,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    folders: int,
) -> None:
    monkeypatch.setenv("WANDB_MODE", asked)
    track().finish()
    assert server.requests == []
    assert len(list((run_dir / "wandb").glob("offline-run-*"))) == folders


def test_a_run_that_resumes_continues_its_own_with_each_row_once(
    track: Callable[..., Tracker], server: FakeWandb, run_dir: Path
) -> None:
    with pytest.raises(RuntimeError):
        train(track(), last=5, ending=RuntimeError("lost a node"))
    assert only_run(server).exit_code == 1
    resumed = track(start_step=4)  # the checkpoint was of step 4, so step 5 is taken again
    resumed.resume_from(4)
    train(resumed, first=5)
    arrived = only_run(server)
    assert [r["train/step"] for r in logged(arrived)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [row["train/step"] for row in read_metrics(run_dir)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert arrived.exit_code == 0
    assert (arrived.summary["status"], arrived.summary.get("error")) == ("completed", None)
    assert "error" not in read_summary(run_dir)
    assert len(read_metrics(run_dir)) == STEPS


def test_a_held_out_loss_that_is_made_up_for_is_a_row_of_its_own_there(
    track: Callable[..., Tracker], server: FakeWandb, run_dir: Path
) -> None:
    """As after a signal that stopped the evaluation of step 4."""
    stopped = track()
    log_steps(stopped, last=3)
    stopped.log(row(4, **{"val/loss": None}))
    stopped.finish("preempted")
    for start, first in ((4, 5), (6, 7)):
        resumed = track(start_step=start)
        resumed.resume_from(start)
        assert resumed.lacks_held_out_loss()
        if start == 4:  # an evaluation was due
            resumed.add_held_out_loss(7.5)
            assert not resumed.lacks_held_out_loss()
        log_steps(resumed, first, first + 1)
        resumed.finish()
        if start == 4:  # the row of step 6 does not arrive at first
            del only_run(server).rows[max(only_run(server).rows)]
            only_run(server).summary["_step"] = 5
    arrived = logged(only_run(server))
    assert [r["train/step"] for r in arrived] == [1, 2, 3, 4, 4, 5, 6, 7, 8]
    assert arrived[4] == {"train/step": 4, "train/tokens": 4 * 3072, "val/loss": 7.5}
    assert read_metrics(run_dir) == [{**dict.fromkeys(NAMES), **row(step)} for step in range(1, STEPS + 1)]


def test_a_second_run_under_one_wandb_run_id_is_told_that_rows_mix(
    track: Callable[..., Tracker],
    server: FakeWandb,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    train(track(), last=4)
    resumed = track(start_step=4)
    resumed.resume_from(4)
    train(resumed, first=5)
    assert not [text for text in said(caplog) if "WANDB_RUN_ID" in text], "the same run"
    run_dir.rename(run_dir.with_name("first"))
    train(track(), last=2)
    told = "W&B: run mine has 8 rows of another folder, and gets this one's too: WANDB_RUN_ID names it"
    assert told in said(caplog)
    assert [row["train/step"] for row in logged(only_run(server))] == [*range(1, 9), 1, 2]


def test_a_moved_folder_continues_its_run_and_a_copy_is_a_run_of_its_own(
    track: Callable[..., Tracker], server: FakeWandb, run_dir: Path
) -> None:
    with pytest.raises(RuntimeError):
        train(track(), last=4, ending=RuntimeError("lost a node"))
    original = run_dir.with_name("original")
    run_dir.rename(original)
    shutil.copytree(original, run_dir)
    resumed = track(start_step=4)  # where the run was: the original is elsewhere and does not know it
    resumed.resume_from(4)
    train(resumed, first=5, last=6, ending=None)
    assert [row["train/step"] for row in logged(only_run(server))] == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(original)
    run_dir.rename(original)
    shutil.copytree(original, run_dir)
    (original / "wandb" / "folder").write_text(str(original))  # where it is resumed meanwhile
    (run_dir / "wandb" / "folder").write_text(str(original))
    resumed = track(start_step=6)
    resumed.resume_from(6)
    train(resumed, first=7)
    first, copy = (logged(run) for run in server.runs.values())
    assert [row["train/step"] for row in first] == [1, 2, 3, 4, 5, 6]
    assert [row["train/step"] for row in copy] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_rows_that_did_not_arrive_before_a_client_was_killed_arrive_when_the_run_resumes(
    track: Callable[..., Tracker], server: FakeWandb, run_dir: Path
) -> None:
    train(track(), last=6)
    arrived = only_run(server)
    for key in sorted(arrived.rows)[4:]:  # as if they had been on their way
        del arrived.rows[key]
    arrived.summary["_step"] = 3
    resumed = track(start_step=6)
    resumed.resume_from(6)
    train(resumed, first=7)
    assert [r["train/step"] for r in logged(only_run(server))] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_rows_that_were_not_on_disk_before_an_offline_client_was_killed_are_when_the_run_resumes(
    track: Callable[..., Tracker], server: FakeWandb, cfg: Config, run_dir: Path
) -> None:
    cfg.logger.mode = WandbMode.offline
    train(track(), last=6)
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    (path,) = folder.glob("run-*.wandb")
    assert rows_on_disk([folder]) == 6
    while rows_on_disk([folder]) == 6:  # as if it had been killed before
        os.truncate(path, path.stat().st_size - 1)
    assert rows_on_disk([folder]) == 5
    resumed = track(start_step=6)
    resumed.resume_from(6)
    train(resumed, first=7)
    assert resumed._wandb is not None
    folders = resumed._wandb.page_or_sync_command().removeprefix("wandb sync ").split()
    assert folders == sorted(map(str, (run_dir / "wandb").glob("offline-run-*")))
    sync(server, *map(Path, folders))
    assert [r["train/step"] for r in logged(only_run(server))] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_run_that_goes_on_online_says_what_of_it_was_offline(
    track: Callable[..., Tracker], server: FakeWandb, cfg: Config, run_dir: Path
) -> None:
    cfg.logger.mode = WandbMode.offline
    train(track(), last=6)
    cfg.logger.mode = WandbMode.online
    resumed = track(start_step=6)
    resumed.resume_from(6)
    train(resumed, first=7)
    assert [r["train/step"] for r in logged(only_run(server))] == [7, 8]
    assert resumed._wandb
    page, _, command = resumed._wandb.page_or_sync_command().partition("; what was offline: wandb sync ")
    assert page == resumed._wandb.url
    sync(server, Path(command))
    assert sorted(r["train/step"] for r in logged(only_run(server))) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert resumed._wandb.page_or_sync_command() == page


def test_rows_that_an_offline_client_has_not_written_since_the_disk_was_full_are_in_another_folder(
    track: Callable[..., Tracker],
    server: FakeWandb,
    cfg: Config,
    run_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cfg.logger.mode = WandbMode.offline
    tracker = track()
    client, end = tracker._wandb, WandbRun.finish
    assert client

    def finish(wandb: WandbRun, *how: Any, **also: Any) -> None:
        end(wandb, *how, **also)
        (path,) = client.folder.glob("run-*.wandb")
        while wandb is client and (rows_on_disk([client.folder]) or 0) > 3:
            os.truncate(path, path.stat().st_size - 1)

    monkeypatch.setattr(WandbRun, "finish", finish)
    monkeypatch.setattr(tracker._metrics, "_problem", "No space left on device")
    train(tracker)
    assert tracker._wandb
    folders = tracker._wandb.page_or_sync_command().removeprefix("wandb sync ").split()
    assert len(folders) == 2
    sync(server, *map(Path, folders))
    assert [r["train/step"] for r in logged(only_run(server))] == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("ending", "code", "status"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "preempted")]
)
def test_a_stopped_run_is_closed_as_one(
    track: Callable[..., Tracker], server: FakeWandb, ending: signal.Signals, code: int, status: str
) -> None:
    with pytest.raises(Stopped):
        train(track(), last=3, ending=Stopped(ending))
    arrived = only_run(server)
    assert arrived.exit_code == code
    assert arrived.summary["status"] == status
    assert len(arrived.history) == 3


def test_the_client_is_not_imported_where_it_is_not_wanted() -> None:
    code = "import sys, tpresearch.track; sys.exit('wandb' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_records_are_read_in_parts_that_end_with_a_block_and_no_whole_one_is_cut(tmp_path: Path) -> None:
    """The first leaves three bytes of its block, too few for another's header."""

    def part(content: bytes, kind: int) -> bytes:
        return PART_HEADER.pack(0, len(content), kind) + content

    long = b"x" * (BLOCK_BYTES - len(FILE_HEADER) - PART_HEADER.size - 3)
    log = (
        FILE_HEADER
        + part(long, FULL)
        + bytes(3)
        + part(b"in three ", 2)
        + part(b"par", 3)
        + part(b"ts", LAST)
    )
    half = part(b"half", FULL)[:-1]
    assert list(read_records(log + half)) == [(long, BLOCK_BYTES - 3), (b"in three parts", len(log))]
    (tmp_path / "run-1.wandb").write_bytes(log + half)
    cut_half_record(tmp_path / "run-1.wandb")
    assert (tmp_path / "run-1.wandb").read_bytes() == log


def test_folders_of_one_second_are_one_runs_parts(tmp_path: Path) -> None:
    mine = ["offline-run-20261129_110508-ab[1]", "offline-run-20261129_110508-ab[1]-1"]
    later = "offline-run-20261129_110509-ab[1]"
    others = (
        "run-20261129_110508-ab[1]",
        "offline-run-20261129_110508-cab[1]",
        "offline-run-20261129_110508-ab1",
    )
    for name in (*others, later, *mine):
        (tmp_path / name).mkdir()
    assert [part.name for part in parts_of(tmp_path, "offline-run", "ab[1]")] == [*mine, later]
    assert [part.name for part in parts_of(tmp_path, "run", "ab[1]")] == [others[0]]
    assert parts_of(tmp_path / "none", "run", "ab[1]") == []
