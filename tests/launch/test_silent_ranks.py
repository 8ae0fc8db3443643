"""The sentence of torchrun's agent on a rank that ended without an error of its own."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousConnectionError

from tpresearch.agent import LOST_RENDEZVOUS, _exit_code, silent_end

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
