"""Steps that all ranks do together and that may fail on one: every rank then raises, and none waits in vain."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from tpresearch.checkpoint.disk import BrokenCheckpoint
from tpresearch.config.errors import one_line

Found = TypeVar("Found")

TIMEOUT = timedelta(hours=2)
"""How long a rank that has written its part waits for one that has not. The death of a rank is noticed at once."""


class RankFailed(Exception):
    """A rank could not do its part; the message says which and why, in one line. Raised on every rank."""


def checkpoint_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks for checkpoints only, separate from NCCL and the steps, with a long timeout. None for one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


def on_all_ranks(work: Callable[[], Found], group: dist.ProcessGroup | None) -> list[Found]:
    """`work()` of every rank, by rank. Collective.

    Raises:
        RankFailed: on every rank, if an OSError or a broken checkpoint stops one of them. Other exceptions propagate, which
            ends the other ranks too.
    """
    mine: Found | RankFailed
    try:
        mine = work()
    except (OSError, BrokenCheckpoint) as error:
        mine = RankFailed(error_line(error))
    results = [mine] * (group.size() if group else 1)
    if group:
        dist.all_gather_object(results, mine, group=group)
    for rank, problem in enumerate(results):
        if isinstance(problem, RankFailed):
            raise problem if group is None else RankFailed(f"rank {rank}: {problem}")
    return [found for found in results if not isinstance(found, RankFailed)]


@contextmanager
def dcp_arguments(group: dist.ProcessGroup | None) -> Iterator[dict[str, Any]]:
    """Arguments for a save or load by DCP on these ranks, or without ranks: then silencing the warning of each call.

    Raises:
        RankFailed: for what DCP raises on every rank; it names the rank if there are several and not all failed.
    """
    with warnings.catch_warnings():
        if group is None:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield {"process_group": group, "no_dist": group is None}
        except CheckpointException as error:
            rank, (cause, _) = min(error.failures.items())
            where = f"rank {rank}: " if group is not None and len(error.failures) == 1 else ""
            raise RankFailed(where + error_line(cause)) from None


def error_line(error: BaseException) -> str:
    """An error's message, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return one_line(error)
