"""The real W&B client against a server on loopback: what arrives, and what an outage costs."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from example_run import STEPS, log_steps, train
from fake_wandb import DUMMY_KEY, ENTITY, FakeRun, FakeWandb

from tpresearch.config import Config
from tpresearch.config.compose import as_dict
from tpresearch.config.schema import WandbMode
from tpresearch.track import Tracker
from tpresearch.track.names import NAMES
from tpresearch.track.record import read_metrics, read_summary
from tpresearch.track.wandb_host import answers

FINISH_S = 2.0  # finish_timeout of these tests
SLACK_S = 3.0  # for starting and stopping the client on a busy machine


def only_run(server: FakeWandb) -> FakeRun:
    (run,) = server.runs.values()
    return run


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Our own lines; the client's go to its debug.log, and reach pytest alone."""
    return [record.message for record in caplog.records if record.name.startswith("tpresearch")]


def logged(run: FakeRun) -> list[dict]:
    return [{name: value for name, value in r.items() if not name.startswith("_")} for r in run.history]


def sync(server: FakeWandb, *folders: Path) -> None:
    command = [str(Path(sys.executable).parent / "wandb"), "sync", "--include-online", *map(str, folders)]
    environment = os.environ | server.env()
    del environment["WANDB_MODE"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=30)


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
    assert arrived.config == as_dict(cfg)
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
    assert tracker._wandb.where() == f"{server.url}/{ENTITY}/tpresearch/runs/{arrived.name}"
    assert capsys.readouterr() == ("said by the loop\n", "")  # the client says nothing on its own


def test_the_config_says_project_group_entity_name_and_job(
    track: Callable[..., Tracker], server: FakeWandb, cfg: Config
) -> None:
    cfg.logger.project, cfg.logger.group, cfg.logger.name, cfg.logger.job_type = (
        "study",
        "ablation",
        "a",
        "bench",
    )
    cfg.logger.entity = ENTITY
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
    assert said(caplog) == ["W&B: offline, for there is no API key; `wandb login` or WANDB_API_KEY gives one"]
    assert server.requests == []
    (folder,) = (run_dir / "wandb").glob("offline-run-*")
    assert tracker._wandb is not None
    assert tracker._wandb.where() == f"wandb sync {folder}"
    sync(server, folder)
    assert logged(only_run(server)) == read_metrics(run_dir)
    assert only_run(server).display_name == "llama2_tiny/fsdp2-tp2"


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
    assert time.monotonic() - began < SLACK_S
    assert said(caplog) == ["W&B: offline, for http://127.0.0.1:1 does not answer"]
    sync(server, *(run_dir / "wandb").glob("offline-run-*"))
    assert logged(only_run(server)) == read_metrics(run_dir)


def test_a_host_is_sought_through_the_proxy_that_leads_there(
    server: FakeWandb, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not answers("https://wandb.invalid")
    monkeypatch.setenv("https_proxy", server.url)
    assert answers("https://wandb.invalid")
    monkeypatch.setenv("no_proxy", "wandb.invalid")
    assert not answers("https://wandb.invalid")


@pytest.mark.parametrize("status", [500, 403])
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
    assert time.monotonic() - began < 2 + SLACK_S  # init_timeout of these tests is 2
    assert said(caplog)[0].startswith("W&B: online is not to be had: ")
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
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
        began = time.monotonic()
        command = [sys.executable, "-m", "example_run", str(run_dir)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert time.monotonic() - began < 2 + 2 + 2 * SLACK_S  # init_timeout, the client's farewell; two starts
    assert ended.returncode == 0
    assert ended.stderr.startswith("W&B: online is not to be had: ")
    assert ended.stderr.count("\n") == 1
    assert "W&B    wandb sync" in ended.stdout
    assert len(read_metrics(run_dir)) == STEPS


@pytest.mark.parametrize("outage", ["errors", "gone"])
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
        assert time.monotonic() - began < 0.5
        began = time.monotonic()
    assert time.monotonic() - began < FINISH_S + SLACK_S
    assert said(caplog) == ["W&B: Timed out finishing run.; metrics.jsonl has every row all the same"]
    assert [r["train/step"] for r in read_metrics(run_dir)] == list(range(1, STEPS + 1))
    assert read_summary(run_dir)["status"] == "completed"
    (folder,) = (run_dir / "wandb").glob("run-*")
    assert tracker._wandb is not None
    assert tracker._wandb.where() == f"wandb sync --include-online {folder}"
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


def test_a_resumed_run_continues_its_own(
    track: Callable[..., Tracker], server: FakeWandb, run_dir: Path
) -> None:
    with pytest.raises(RuntimeError):
        train(track(), last=5, ending=RuntimeError("lost a node"))
    assert only_run(server).exit_code == 1
    train(track(start_step=4), first=5)  # the checkpoint was of step 4, so step 5 is logged again
    arrived = only_run(server)
    assert [r["train/step"] for r in logged(arrived)] == [1, 2, 3, 4, 5, 5, 6, 7, 8]
    assert arrived.exit_code == 0
    assert arrived.summary["status"] == "completed"
    assert "error" not in read_summary(run_dir)
    assert len(read_metrics(run_dir)) == STEPS


def test_a_preempted_run_is_closed_as_one(track: Callable[..., Tracker], server: FakeWandb) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(track(), last=3, ending=signal.SIGINT)
    arrived = only_run(server)
    assert arrived.exit_code == 143
    assert arrived.summary["status"] == "preempted"
    assert len(arrived.history) == 3


def test_runs_of_a_sweep_can_share_a_folder(
    track: Callable[..., Tracker], cfg: Config, run_dir: Path, tmp_path: Path
) -> None:
    cfg.logger.dir = str(tmp_path / "sweep")
    track().finish()
    assert len(list((tmp_path / "sweep" / "wandb").glob("offline-run-*"))) == 1
    assert [path.name for path in (run_dir / "wandb").iterdir()] == ["id"]


def test_the_client_is_not_imported_where_it_is_not_wanted() -> None:
    code = "import sys, tpresearch.track; sys.exit('wandb' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
