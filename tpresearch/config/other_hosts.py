"""What a rank that ends before the ranks have met tells those of other hosts, which wait for it: their torchrun does not."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from tpresearch.config.errors import ConfigError, RunFailed, first_line, format_value
from tpresearch.config.world import RUN_ID

if TYPE_CHECKING:
    from torch.distributed import Store


def job_key(name: str) -> str:
    """A key of this job in the agents' store, over all restarts."""
    return f"tpresearch/{os.environ.get(RUN_ID)}/{name}"


MET_KEY = "tpresearch/met"
"""Key of the name of the last meeting of the job's ranks."""
_meeting: list[str] = []
"""The name of the meeting of this start's ranks, once they have met."""


def note_meeting(name: str) -> None:
    _meeting[:] = [name]


def notice_key(store: Store) -> str:
    """Key of the notice that a rank of this start has ended.

    A start is told from others by its meeting, or before that by the last one and the restart count. The count alone would
    not do: where ranks of one host have failed, torchrun starts those of the others again without counting that.
    """
    if _meeting:
        return job_key(f"ended/{_meeting[0]}")
    last = store.get(MET_KEY).decode() if store.check([MET_KEY]) else ""
    return job_key(f"ended/{last}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}")


def stopped_key(rank: int) -> str:
    """Key of the note that this rank was stopped by a signal, probably with the torchrun that started it."""
    return job_key(f"stopped/{rank}")


def begun_key() -> str:
    """Key of the note that this job has begun to train in its folder."""
    return job_key("begun")


def notice_of(error: BaseException) -> str:
    """The notice: this rank, and why it ends."""
    if isinstance(error, ConfigError):
        why = [error.field, format_value(error.value), error.why, error.legal]
    else:
        why = [f"{type(error).__name__}: {first_line(error)}"]
    return json.dumps([os.environ["RANK"], *why])


def check_notice(store: Store) -> None:
    """End this rank too if another has: refused as that one was, or with RunFailed if it failed otherwise."""
    if not store.check([key := notice_key(store)]):
        return
    rank, *told = json.loads(store.get(key))
    if len(told) == 1:
        raise RunFailed(f"rank {rank} has ended: {told[0]}")
    field, value, why, legal = told
    raise ConfigError(field, value, f"{why} (on rank {rank})", legal)
