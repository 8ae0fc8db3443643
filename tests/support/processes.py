"""Processes that a test starts and kills: which are there, and when they are gone."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from pathlib import Path

HANG_GUARD_S = 600


def marked(mark: str) -> list[int]:
    """The processes whose environment has this in it and that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return [pid for pid in found if runs(pid)]


def runs(pid: int) -> bool:
    """Whether a process is there and more than what its parent has yet to ask about."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(true: Callable[[], object]) -> None:
    until = time.monotonic() + HANG_GUARD_S
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def forked(work: Callable[[], object]) -> int:
    """The process id of a fork that does this work and then ends with code 0, or with that of its SystemExit."""
    if pid := os.fork():
        return pid
    gc.disable()  # garbage of the parent's may wait for threads that a fork has not, as stores of torch do
    code = 1
    try:
        work()
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        os._exit(code)


def ended(pid: int) -> int:
    """The exit code of a fork, once it has ended."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
