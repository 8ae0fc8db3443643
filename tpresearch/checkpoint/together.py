"""Steps that all ranks do together and that may fail on one: all learn of it, and none waits for another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from tpresearch.checkpoint.disk import BrokenCheckpoint

Found = TypeVar("Found")

SLOWEST_DISK = timedelta(hours=2)
"""How long a rank that has written its part waits for one that has not. It learns at once of a rank that died."""


class RankFailed(Exception):
    """A rank could not do its part; the message says which and why, in one line. Raised on every rank."""


def own_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks for checkpoints only, separate from NCCL and the steps, with a long timeout. None for one rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.new_group(backend="gloo", timeout=SLOWEST_DISK)


def together(work: Callable[[], Found], group: dist.ProcessGroup | None) -> list[Found]:
    """`work()` of every rank, by rank. Collective.

    Raises:
        RankFailed: on every rank, where the disk or what is on it keeps one of them from it. A bug is raised as it is,
            which ends the other ranks too.
    """
    mine: tuple[Any, str | None]
    try:
        mine = work(), None
    except (OSError, BrokenCheckpoint) as error:
        mine = None, line_of(error)
    if group is None:
        told = [mine]
    else:
        told = [mine] * group.size()
        dist.all_gather_object(told, mine, group=group)
    for rank, (_, problem) in enumerate(told):
        if problem is not None:
            raise RankFailed(problem if len(told) == 1 else f"rank {rank}: {problem}")
    return [found for found, _ in told]  # type: ignore[misc]


@contextmanager
def dcp_among(group: dist.ProcessGroup | None) -> Iterator[dict[str, Any]]:
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
            one_of_several = group is not None and len(error.failures) == 1
            raise RankFailed(f"rank {rank}: {line_of(cause)}" if one_of_several else line_of(cause)) from None


def line_of(error: BaseException) -> str:
    """An error's message, on one line."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}{f' ({error.filename})' if error.filename else ''}"
    return " ".join(str(error).split()) or type(error).__name__
