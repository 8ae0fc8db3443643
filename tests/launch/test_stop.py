"""Signals stop what runs where it can stop, without a traceback, and nothing outlives its parent."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import TORCHRUN, environment, installed, on_path
from support.launches import PROGRAM
from support.marks import exhaustive
from support.processes import ended, forked, marked, runs, wait_for
from support.trainings import TINY, TRAIN

from tpresearch import interrupt
from tpresearch.launch import stop
from tpresearch.launch.stop import StopFlag, Stopped, end_with_parent
from tpresearch.train.main import check_stop

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has PR_SET_PDEATHSIG")


@pytest.fixture
def flag() -> Iterator[StopFlag]:
    with StopFlag() as entered:
        yield entered


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_noted_and_stops_what_checks(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopFlag() as flag:
        flag.check()
        os.kill(os.getpid(), number)
        wait_for(lambda: flag.requested)
        with pytest.raises(Stopped, match=f"stopped by {number.name}") as stopped:
            flag.check()
    assert stopped.value.code == 128 + number
    assert signal.getsignal(number) is before


def test_a_stop_before_training_says_so(caplog: pytest.LogCaptureFixture, flag: StopFlag) -> None:
    check_stop(flag)
    assert not caplog.records
    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(lambda: flag.requested)
    with pytest.raises(Stopped):
        check_stop(flag)
    assert [each.message for each in caplog.records] == [
        "stopped by SIGTERM before the first step; the same command starts again"
    ]


def test_a_signal_calls_what_asked_for_it_while_the_main_thread_is_stuck(flag: StopFlag) -> None:
    called = threading.Event()
    with flag.calling(called.set):
        os.kill(os.getpid(), signal.SIGTERM)
        assert called.wait(60)
    called.clear()
    flag._record(signal.SIGTERM, 0)
    assert not called.is_set(), "it asks no longer"


def test_what_is_ignored_already_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopFlag() as flag:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: flag.requested)
        assert flag.requested is signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_ends_a_process_whatever_it_is_in(tmp_path: Path) -> None:
    def busy() -> None:
        with StopFlag() as flag:
            (tmp_path / "ready").touch()
            wait_for(lambda: flag.requested)
            (tmp_path / "noted").touch()
            mutex, libc = ctypes.create_string_buffer(64), ctypes.CDLL(None)
            for _ in range(2):  # for ever in C, as in a collective, where no handler of Python gets a turn
                libc.pthread_mutex_lock(mutex)

    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    pid = forked(busy)
    for file in ("ready", "noted"):
        wait_for((tmp_path / file).exists)
        os.kill(pid, signal.SIGINT)
    assert ended(pid) == 130


def test_torchrun_passing_a_ctrl_c_on_is_no_second_one(
    flag: StopFlag, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends: list[int] = []
    monkeypatch.setattr(stop.os, "_exit", ends.append)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "any")
    for arrives in (0.0, 0.9, 1.1):
        flag._record(signal.SIGTERM, arrives)
        flag._record(signal.SIGINT, arrives)
        assert ends == ([] if arrives < 1 else [130])
    assert flag.requested is signal.SIGTERM, "the first of them is why it stops"


@on_linux
def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    def child() -> None:
        end_with_parent()
        (tmp_path / "child").write_text(f"{os.getpid()}\n")
        time.sleep(600)

    def parent() -> None:
        ended(forked(child))

    pid, child_file = forked(parent), tmp_path / "child"
    wait_for(lambda: child_file.exists() and child_file.read_text().endswith("\n"))
    assert runs(int(child_file.read_text()))
    os.kill(pid, signal.SIGKILL)
    assert ended(pid) == -signal.SIGKILL
    wait_for(lambda: not runs(int(child_file.read_text())))


@on_linux
def test_a_parent_that_has_ended_already_is_noticed() -> None:
    assert ended(forked(lambda: end_with_parent(signal.SIGTERM, parent=1 << 22))) == 143


def start(tmp_path: Path, *command: str) -> subprocess.Popen[str]:
    """A command whose processes all have STOP_TEST in their environment."""
    env = environment(STOP_TEST=str(tmp_path))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    typed = [sys.executable, *command, str(PROGRAM), "name=sleeps", "hydra.run.dir=run"]
    return subprocess.Popen(typed, cwd=tmp_path, env=env, **pipes)


@pytest.mark.cli
def test_ctrl_c_ends_a_command_without_a_traceback(tmp_path: Path) -> None:
    with start(tmp_path) as process:
        wait_for((tmp_path / "run" / "asleep").exists)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
    assert "KeyboardInterrupt" not in err


@pytest.mark.cli
@pytest.mark.parametrize(
    "command",
    [
        [sys.executable, str(TRAIN)],
        [sys.executable, "-m", "tpresearch.compare", "runs"],
        [str(TORCHRUN.with_name("tpresearch")), "compare", "runs"],
    ],
    ids=["train.py", "python -m", "the console script"],
)
def test_ctrl_c_among_the_imports_is_a_line(tmp_path: Path, command: list[str]) -> None:
    imported = tmp_path / "imported"
    (tmp_path / "omegaconf.py").write_text(
        f"import pathlib, time\npathlib.Path({str(imported)!r}).touch()\n"
        "try:\n    time.sleep(600)\nexcept BaseException:\n    import nothing  # as numpy has it\n"
    )
    pipes, env = {"stderr": subprocess.PIPE, "text": True}, environment(**on_path(tmp_path))
    with subprocess.Popen(command, cwd=tmp_path, env=env, **pipes) as process:
        wait_for(lambda: imported.exists() or process.poll() is not None)
        process.send_signal(signal.SIGINT)
        assert process.communicate()[1] == "stopped by SIGINT\n"
    assert process.returncode == 130


def test_ctrl_c_is_left_alone_in_a_program_that_is_none_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        for name, ours in (("-m", True), (str(TRAIN), True), ("mine/train.py", False), ("ipykernel", False)):
            monkeypatch.setattr(sys, "argv", [name])
            interrupt.exit_on_interrupt()
            assert (signal.getsignal(signal.SIGINT) is not signal.default_int_handler) == ours
            interrupt.restore_interrupt()
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.cli
@on_linux
def test_ranks_end_with_a_torchrun_that_is_killed(tmp_path: Path) -> None:
    with start(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2") as torchrun:
        wait_for((tmp_path / "run" / "asleep").exists)
        assert len(marked(f"STOP_TEST={tmp_path}")) >= 3
        torchrun.kill()
        torchrun.wait()  # and no more: ranks that are left would hold its pipes
    try:
        wait_for(lambda: not marked(f"STOP_TEST={tmp_path}"))
    finally:
        for pid in marked(f"STOP_TEST={tmp_path}"):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.cli
@pytest.mark.parametrize(
    ("number", "status"), [exhaustive(signal.SIGTERM, "preempted"), (signal.SIGINT, "interrupted")]
)
def test_a_torchrun_that_is_stopped_ends_in_a_result_and_a_line(
    tmp_path: Path, number: signal.Signals, status: str
) -> None:
    typed = [*TINY, "parallel=ddp", "train.steps=1000000", "hydra.run.dir=run"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env, metrics = environment(**installed(tmp_path / "installed")), tmp_path / "run" / "metrics.jsonl"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*torchrun, str(TRAIN), *typed], cwd=tmp_path, env=env, **pipes) as process:
        wait_for(lambda: (metrics.exists() and metrics.read_text()) or process.poll() is not None)
        process.send_signal(number)
        out, err = process.communicate()
    assert process.returncode == 128 + number
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["status"], summary["error"]) == (status, f"stopped by {number.name}")
    assert json.loads(metrics.read_text().splitlines()[-1])["train/step"] == summary["steps"]
    box, _, after = out.rpartition("┘\n")
    assert f"toy_mlp/ddp2: {status}" in box
    stopped = f"stopped by {number.name} after step {summary['steps']}; to resume: "
    assert after == f"{stopped}torchrun --nproc-per-node=2 {TRAIN} resume=run\n"
    assert "Traceback" not in err
    assert "Sending process" not in err
    for rank in range(2):
        assert "Traceback" not in (tmp_path / "run" / "ranks" / f"rank-0000{rank}.log").read_text()
