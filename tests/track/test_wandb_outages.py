"""W&B that cannot be used, or goes away: said in one line, bounded in time, and nothing is lost."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from support.arrivals import logged, only_run, said, sync
from support.example_run import STEPS, log_steps, row, train
from support.fake_wandb import DUMMY_KEY, FakeWandb
from support.marks import exhaustive

from tpresearch.config import Config
from tpresearch.config.schema import WandbMode
from tpresearch.track.names import complete_row
from tpresearch.track.record import read_metrics, read_summary
from tpresearch.track.tracker import Tracker
from tpresearch.track.wandb_run import SentRows, WandbRun

CLIENT_S = 85.0
"""Less than the 90 s that the client itself would wait for a host; these tests have it wait for 2."""


def test_without_a_key_it_is_offline_and_says_so_in_one_line(
    track: Callable[..., Tracker],
    run_dir: Path,
    server: FakeWandb,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    cfg: Config,
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    cfg.logger.mode = WandbMode.online  # even then
    with caplog.at_level(logging.INFO), track() as tracker:
        log_steps(tracker)
    (line,) = said(caplog)
    assert line.startswith("W&B: offline, because there is no API key; set one with `wandb login` or ")
    assert server.requests == []
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert tracker._wandb is not None
    assert tracker._wandb.page_or_sync_command() == f"wandb sync {folder}"
    sync(server, folder)
    assert logged(only_run(server)) == read_metrics(run_dir)
    assert only_run(server).display_name == "llama2_tiny/fsdp2-tp2"


def test_a_host_that_refuses_is_noticed_at_once(
    track: Callable[..., Tracker],
    server: FakeWandb,
    run_dir: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    began = time.monotonic()
    with track() as tracker:
        log_steps(tracker)
    assert time.monotonic() - began < CLIENT_S
    assert said(caplog) == ["W&B: offline, because http://127.0.0.1:1 does not answer"]
    sync(server, *(run_dir / "wandb").glob("offline-run-*"))
    assert logged(only_run(server)) == read_metrics(run_dir)


@pytest.mark.parametrize("status", [500, exhaustive(403)])
def test_a_host_that_answers_with_errors_costs_init_timeout_and_no_more(
    track: Callable[..., Tracker],
    server: FakeWandb,
    run_dir: Path,
    caplog: pytest.LogCaptureFixture,
    status: int,
) -> None:
    server.fail = status
    began = time.monotonic()
    with track() as tracker:
        log_steps(tracker)
    assert time.monotonic() - began < CLIENT_S
    assert said(caplog)[0].startswith("W&B: could not start in online mode: ")
    assert len(said(caplog)) == 1
    server.fail = None
    sync(server, *(run_dir / "wandb").glob("offline-run-*"))
    assert logged(only_run(server)) == read_metrics(run_dir)
    assert only_run(server).exit_code == 0


def test_a_host_that_is_silent_holds_up_neither_the_start_nor_the_exit(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", DUMMY_KEY)
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        began = time.monotonic()
        command = [sys.executable, "-m", "support.example_run", str(run_dir)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert time.monotonic() - began < CLIENT_S
    assert ended.returncode == 0
    assert ended.stderr.startswith("W&B: could not start in online mode: ")
    assert ended.stderr.count("\n") == 1
    assert "W&B    wandb sync" in ended.stdout
    assert len(read_metrics(run_dir)) == STEPS


@pytest.mark.parametrize("outage", [exhaustive("errors"), "gone"])
def test_a_host_that_goes_away_costs_finish_timeout_and_loses_nothing(
    track: Callable[..., Tracker],
    server: FakeWandb,
    run_dir: Path,
    caplog: pytest.LogCaptureFixture,
    outage: str,
) -> None:
    with track() as tracker:
        log_steps(tracker, last=3)
        if outage == "errors":
            server.fail = 500
        else:
            server.__exit__()
        began = time.monotonic()
        log_steps(tracker, first=4)
    assert time.monotonic() - began < CLIENT_S  # else it would try again for days
    assert said(caplog) == ["W&B: Timed out finishing run.; metrics.jsonl has every row"]
    assert [r["train/step"] for r in read_metrics(run_dir)] == list(range(1, STEPS + 1))
    assert read_summary(run_dir)["status"] == "completed"
    (folder,) = (run_dir / "wandb").glob("run-*")
    assert tracker._wandb is not None
    assert tracker._wandb.page_or_sync_command() == f"wandb sync --include-online {folder}"
    with FakeWandb() as back:
        sync(back, folder)
        assert logged(only_run(back)) == read_metrics(run_dir)
        assert only_run(back).exit_code == 0


@pytest.mark.skipif(shutil.which("ps") is None, reason="looks for the client with ps")
def test_a_client_that_dies_costs_the_run_nothing(
    track: Callable[..., Tracker], server: FakeWandb, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with track() as tracker:
        log_steps(tracker, last=3)
        children = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,comm="], capture_output=True)
        for line in children.stdout.decode().splitlines():
            if "wandb-core" in line:
                os.kill(int(line.split()[0]), signal.SIGKILL)
        log_steps(tracker, first=4)
    assert len(said(caplog)) == 1
    assert len(read_metrics(run_dir)) == STEPS
    assert read_summary(run_dir)["status"] == "completed"
    train(track(start_step=STEPS), first=STEPS + 1, last=STEPS + 1)  # another run of the same process
    assert only_run(server).exit_code == 0


def test_a_full_disk_or_a_folder_that_is_gone_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = Mock(id="a", url=None, settings=Mock(sync_dir=str(tmp_path)))
    wandb = WandbRun(client, SentRows(tmp_path / "gone" / "sent"))
    wandb.log(complete_row(row(1)))
    wandb.log_more({"train/step": 1, "val/loss": 7.5})
    (line,) = said(caplog)
    assert (
        line
        == f"W&B: [Errno 2] No such file or directory: '{tmp_path}/gone/sent'; metrics.jsonl has every row"
    )
    wandb.log(complete_row(row(2)))
    assert client.log.call_count == 0
    (tmp_path / "gone").mkdir()
    wandb.finish({}, 0)
    assert [sent.args[0]["train/step"] for sent in client.log.call_args_list] == [1, 2], "once it is there"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5, limits[1]))
    wandb.log(complete_row(row(34)))  # of which there is room for a digit
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    wandb.log(complete_row(row(35)))
    assert (tmp_path / "gone" / "sent").read_text() == "1\n2\n34\n35\n"
    assert client.log.call_count == 4
