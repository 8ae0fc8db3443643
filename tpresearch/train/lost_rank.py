"""Where another rank fails or is lost, this one ends with it: by one sentence that says why, and not by what gloo or NCCL says of it."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

from tpresearch.config.errors import RunFailed
from tpresearch.launch import Run
from tpresearch.launch.agents_store import hear_other_hosts
from tpresearch.launch.logs import IN_FILES_ONLY
from tpresearch.launch.stop import StopFlag
from tpresearch.parallel.device import Device
from tpresearch.parallel.group import abort_group
from tpresearch.track.next_steps import NextSteps
from tpresearch.track.tracker import Tracker

log = logging.getLogger(__name__)

SIGNS = r"\[\S*gloo/transport/|remote process exited"
"""Of gloo, but for its own assertions, and of NCCL, where a message does not arrive."""
WAIT_S, POLL_S = 5, 0.5
"""How long a rank waits for the reason why a message did not arrive. Its connections stay open meanwhile, for which others may wait."""


class RankLost(RunFailed):
    """Another rank does not answer, and nothing is known of it."""


@contextmanager
def ending_with_other_ranks(run: Run, tracker: Tracker | None, flag: StopFlag) -> Iterator[None]:
    """Context in which this rank depends on the others. If one of this host has failed, which torchrun reports, the record
    states that one's error, and this rank says no more.

    Raises:
        RunFailed: if one of another host has failed, or one is lost.
    """
    try:
        yield
    except Exception as error:
        lost = _await_reason(run, flag) if _is_loss(error) else None
        if (lost or flag.requested) and (fault := fault_of_another_rank()):
            if tracker:
                tracker.finish(status="failed", error=fault)
            sys.exit(1)
        if lost is None:
            raise
        log.error("%s", error, extra=IN_FILES_ONLY)
        raise lost from None


def _is_loss(error: Exception) -> bool:
    is_of_store = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
    return is_of_store or re.search(SIGNS, str(error)) is not None


def _await_reason(run: Run, flag: StopFlag) -> RunFailed:
    """Wait until the reason is there to be read, or torchrun stops this rank, as it does where another of this host has ended.

    Returns: what another host has told, or that a rank is lost.
    """
    until = time.monotonic() + WAIT_S
    try:
        while not (flag.requested or fault_of_another_rank()) and time.monotonic() < until:
            time.sleep(POLL_S)  # first, since the store of a host that is lost may be a moment from its end
            if run.world.hosts > 1:
                hear_other_hosts()
    except RunFailed as told:
        return told
    command = NextSteps(run.command, run.check_command).to_resume(run.folder)
    why = "another rank does not answer: it was killed, or its host or the network is down"
    return RankLost(f"{why}; to resume: {command}")


def leave_failed_ranks(device: Device) -> None:
    """Where torchrun stops this rank because another failed: on a GPU, the next collective would wait for that one for ever."""
    if device.backend == "nccl" and fault_of_another_rank():
        abort_group()


def fault_of_another_rank() -> str | None:
    """What another rank of this host failed with, as torchrun keeps it: <attempt>/<rank>/error.json."""
    mine = os.environ.get("TORCHELASTIC_ERROR_FILE")
    for path in sorted(Path(mine).parents[1].glob("*/error.json")) if mine else ():
        with suppress(OSError, ValueError, KeyError, TypeError):
            message = json.loads(path.read_text())["message"]
            text = message["message"] if isinstance(message, dict) else message
            return f"rank {path.parent.name}: {text.splitlines()[0].removeprefix('refused: ')}"
    return None
