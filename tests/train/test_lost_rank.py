"""Where one rank fails or is lost, the others end by a sentence that says why, and not by what gloo says of it."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed import TCPStore

from tpresearch.config.errors import RunFailed
from tpresearch.config.other_hosts import check_notice
from tpresearch.config.world import World
from tpresearch.launch import Run
from tpresearch.launch.agents_store import tell_other_hosts
from tpresearch.launch.command import Command
from tpresearch.launch.refuse import exit_failed
from tpresearch.launch.stop import StopFlag
from tpresearch.parallel.device import CPU, Device
from tpresearch.parallel.group import process_group
from tpresearch.track.tracker import Status, Tracker
from tpresearch.train import lost_rank
from tpresearch.train.lost_rank import (
    RankLost,
    ending_with_other_ranks,
    fault_of_another_rank,
    leave_failed_ranks,
)
from tpresearch.verify.ranks import Ranks

LOST = dist.DistStoreError("failed to recv, got 0 bytes")
WHY = "another rank does not answer: it was killed, or its host or the network is down; to resume: torchrun --nnodes=2 --nproc-per-node=2 train.py parallel=ddp"


@pytest.fixture(autouse=True)
def _without_waiting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lost_rank, "WAIT_S", 0.1)
    monkeypatch.setattr(lost_rank, "POLL_S", 0.01)
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)


class Record(Tracker):
    """Of a run that is not there."""

    def __init__(self) -> None:
        self.ended: list[tuple[Status, str | None]] = []

    def finish(self, status: Status = "completed", error: str | None = None) -> None:
        self.ended.append((status, error))


def run_of_rank(rank: int) -> Run:
    """Of two hosts with two ranks each."""
    world = World(rank, 4, rank % 2, 2, elastic=True)
    return Run(Path("mine"), world, command=Command(("parallel=ddp",), 2, 2, program=("train.py",)))


def test_the_fault_of_another_rank_is_found_where_torchrun_keeps_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    assert fault_of_another_rank() is None
    (tmp_path / "1" / "error.json").write_text('{"message": {"message": "ValueError: no luck\\nand more"}}')
    assert fault_of_another_rank() == "rank 1: ValueError: no luck"
    (tmp_path / "1" / "error.json").write_text('{"message": "refused: train.lr=0: too small"}')
    assert fault_of_another_rank() == "rank 1: train.lr=0: too small"


@pytest.mark.parametrize("fault", [None, "rank 1: ValueError: no luck"])
@pytest.mark.parametrize("error", [LOST, RuntimeError("another rank failed")])
def test_a_rank_that_another_takes_along_records_that_ones_error_and_says_no_more(
    monkeypatch: pytest.MonkeyPatch, error: Exception, fault: str | None
) -> None:
    monkeypatch.setattr(lost_rank, "fault_of_another_rank", lambda: fault)
    record, flag = Record(), StopFlag()
    flag.requested = signal.SIGTERM
    otherwise = RankLost if error is LOST else type(error)
    ends = pytest.raises(SystemExit if fault else otherwise)
    with ends as raised, ending_with_other_ranks(run_of_rank(0), record, flag):
        raise error
    assert record.ended == ([("failed", fault)] if fault else [])
    assert not fault or (isinstance(raised.value, SystemExit) and raised.value.code == 1)


def test_a_fault_is_waited_for_that_is_written_after_the_connection_has_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    faults = iter([None, None, *["rank 2: ValueError: no luck"] * 2])
    monkeypatch.setattr(lost_rank, "fault_of_another_rank", lambda: next(faults))
    with pytest.raises(SystemExit), ending_with_other_ranks(run_of_rank(3), None, StopFlag()):
        raise LOST


def test_of_a_lost_rank_it_is_said_what_may_have_happened_and_which_command_goes_on() -> None:
    ends = pytest.raises(RankLost, match=f"^{re.escape(WHY)}$")
    with ends, ending_with_other_ranks(run_of_rank(0), None, StopFlag()):  # which has no checkpoint
        raise LOST


def test_what_another_host_has_told_is_the_reason(agent: TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lost_rank, "WAIT_S", 60)
    tell_other_hosts(ValueError("line 3 is wrong\n..."), run_of_rank(0).world)
    ends = pytest.raises(RunFailed, match=r"^rank 3 has ended: ValueError: line 3 is wrong$")
    with ends, ending_with_other_ranks(run_of_rank(2), None, StopFlag()):
        raise LOST


@pytest.mark.parametrize(("host", "says"), [("0", False), ("1", True)])
def test_a_host_on_which_no_report_is_shown_says_it_once_and_tells_the_others(
    agent: TCPStore,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    host: str,
    says: bool,
) -> None:
    monkeypatch.setenv("GROUP_RANK", host)
    for rank in ("2", "3"):
        (tmp_path / rank).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / rank / "error.json"))
        with pytest.raises(SystemExit, match=r"^1$"):
            exit_failed(RankLost("another rank does not answer"), run_of_rank(int(rank)).world)
    assert capsys.readouterr().err == "error: another rank does not answer\n" * says
    with pytest.raises(RunFailed, match="rank 3 has ended: RankLost: another rank does not answer"):
        check_notice(agent)


def lose(world: World) -> str:
    """What rank 0 makes of what gloo says, after rank 1 has left."""
    run = Run(Path("mine"), world)
    try:
        with (
            patch.object(lost_rank, "WAIT_S", 0),
            ending_with_other_ranks(run, None, StopFlag()),
            process_group(CPU, world),
        ):
            if world.rank == 0:
                dist.all_reduce(torch.ones(1))
    except RankLost as lost:
        return str(lost)
    return ""


def test_what_gloo_says_of_a_rank_that_is_gone_is_known(ranks: Ranks) -> None:
    said, _ = ranks.run(2, lose)
    assert said.startswith("another rank does not answer")


@pytest.mark.parametrize(
    ("backend", "fault", "aborts"), [("nccl", "x", 1), ("nccl", None, 0), ("gloo", "x", 0)]
)
def test_a_rank_does_not_wait_on_a_gpu_for_one_that_failed(
    monkeypatch: pytest.MonkeyPatch, backend: str, fault: str | None, aborts: int
) -> None:
    """Preempted, with all ranks there, it does: they stop together."""
    aborted: list[int] = []
    monkeypatch.setattr(lost_rank, "fault_of_another_rank", lambda: fault)
    monkeypatch.setattr(lost_rank, "abort_group", lambda: aborted.append(1))
    leave_failed_ranks(Device(torch.device("cpu"), backend, "cpu"))
    assert len(aborted) == aborts
