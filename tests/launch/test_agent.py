"""What our entry point in torchrun's agent tells the ranks, and says of one that ended without an error of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.trainings import TRAIN
from torch.distributed import DistNetworkError
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError
from torch.distributed.launcher.api import LaunchConfig

from tpresearch import agent
from tpresearch.agent import LOST_RENDEZVOUS, _exit_code, silent_end
from tpresearch.config.world import OWN_DEVICE


@pytest.fixture
def as_torchrun(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LaunchConfig]:
    """A function that loads our agent as `torchrun` does with these words; it returns what torchrun makes of them."""
    set_for_ranks = (
        agent.TORCHRUN_OPTIONS,
        agent.HEARD_SIGNALS,
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
        OWN_DEVICE,
    )
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(agent, "LOGGERS", ())
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)

    def load(*words: str) -> LaunchConfig:
        for name in set_for_ranks:
            monkeypatch.setenv(name, "")  # so that it is put back afterwards
            monkeypatch.delenv(name)
        monkeypatch.setattr(sys, "argv", ["/bin/torchrun", *words])
        agent.handler()
        config, *_ = torchrun.config_from_args(torchrun.parse_args(list(words)))
        return config

    return load


@pytest.mark.parametrize(
    ("typed", "told"), [("--virtual-local-rank", "1"), ("--virtual_loc", "1"), ("--standalone", None)]
)
def test_ranks_are_told_that_each_sees_its_gpu_alone(
    as_torchrun: Callable[..., LaunchConfig], typed: str, told: str | None
) -> None:
    as_torchrun(typed, str(TRAIN))
    assert os.environ.get(OWN_DEVICE) == told
    assert os.environ[agent.TORCHRUN_OPTIONS] == typed


@pytest.mark.skipif(
    not hasattr(LaunchConfig, "shutdown_timeout"), reason="torch before 2.12 has no such option"
)
def test_ranks_of_ours_have_two_minutes_to_save(as_torchrun: Callable[..., LaunchConfig]) -> None:
    assert as_torchrun("--standalone", "/bin/true").shutdown_timeout == 30
    assert as_torchrun("--standalone", str(TRAIN)).shutdown_timeout == agent.SAVE_TIME_S == 120
    assert as_torchrun("--standalone", "--shutdown-timeout=7", str(TRAIN)).shutdown_timeout == 7


@pytest.mark.usefixtures("terminal")
def test_under_nohup_ranks_outlive_their_terminal(as_torchrun: Callable[..., LaunchConfig]) -> None:
    assert "SIGHUP" in as_torchrun(str(TRAIN)).signals_to_handle.split(",")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert as_torchrun(str(TRAIN)).signals_to_handle == "SIGTERM,SIGINT,SIGQUIT"
        assert as_torchrun("--signals-to-handle=SIGHUP", str(TRAIN)).signals_to_handle == "SIGHUP"
    finally:
        signal.signal(signal.SIGHUP, before)


BY_THE_KERNEL = ", as by the kernel where the host's memory or the job's share of it is used up"


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (-signal.SIGKILL, f"was ended by SIGKILL{BY_THE_KERNEL}"),
        (-signal.SIGSEGV, "was ended by SIGSEGV"),
        (3, "ended with exit code 3, and no error"),
    ],
)
def test_the_rank_and_its_signal_or_code_are_named(tmp_path: Path, code: int, how: str) -> None:
    error = ChildFailedError("train.py", {3: failure(tmp_path, code, has_error=False)})
    assert silent_end(error) == f"rank 3 {how}; errors of other ranks follow from that"


def test_a_rank_with_an_error_of_its_own_needs_no_sentence(tmp_path: Path) -> None:
    assert silent_end(ChildFailedError("train.py", {3: failure(tmp_path, 1, has_error=True)})) is None


def test_a_rendezvous_that_is_lost_is_told_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    error = RendezvousConnectionError("The connection to the C10d store has failed. See inner exception.")
    error.__cause__ = DistNetworkError("failed to recv, got 0 bytes\nException raised from recvBytes")
    assert _exit_code(error) == 1
    assert capsys.readouterr().err == f"torchrun: {LOST_RENDEZVOUS} (failed to recv, got 0 bytes)\n"


def failure(folder: Path, code: int, has_error: bool, timestamp: int = 0) -> ProcessFailure:
    """Of a rank: torchrun reads its error, if it left one."""
    path = folder / f"{code}.json"
    if has_error:
        extra = {"timestamp": str(timestamp)}
        path.write_text(json.dumps({"message": {"message": "ValueError: mine", "extraInfo": extra}}))
    return ProcessFailure(0, 17, code, str(path))


def test_a_rank_that_was_killed_is_named_though_the_error_of_another_seems_to_be_the_first(
    tmp_path: Path,
) -> None:
    failures = {0: failure(tmp_path, 1, True), 1: failure(tmp_path, -signal.SIGKILL, False)}
    assert (silent_end(ChildFailedError("train.py", failures)) or "").startswith(
        "rank 1 was ended by SIGKILL, "
    )


def test_a_rank_that_aborts_after_the_error_of_another_is_not_named(tmp_path: Path) -> None:
    failures = {0: failure(tmp_path, 1, True), 1: failure(tmp_path, -signal.SIGABRT, False)}
    assert silent_end(ChildFailedError("train.py", failures)) is None
    assert silent_end(ValueError("of torchrun itself")) is None


def test_an_error_that_another_rank_waited_for_in_vain_is_reported(tmp_path: Path) -> None:
    """As of one that had W&B to close before torchrun got to know its error."""
    said = tmp_path / "refused.json"
    said.write_text(json.dumps({"message": "refused: another rank does not answer", "timestamp": 0}))
    for code in (1, -signal.SIGTERM):
        failures = {1: ProcessFailure(0, 17, code, str(said))}
        assert _exit_code(ChildFailedError("train.py", failures)) == 1
    failures[0] = failure(tmp_path, 1, has_error=True, timestamp=9)
    assert _exit_code(ChildFailedError("train.py", failures)) is None
