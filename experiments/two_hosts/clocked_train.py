"""`train.py`, with a clock on each step: how long it took, and what the cores did meanwhile, for this rank and for everyone.

Run by `slowed.py` inside the namespaces. Beside its usual files a run leaves `clock-RANK.jsonl`, a line per step.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tpresearch.launch import Run, entrypoint
from tpresearch.train.main import train
from tpresearch.train.observe import Observer
from tpresearch.train.preflight import Preflight, preflight
from tpresearch.train.state import TrainState


@entrypoint("train", preflight=preflight)
def main(job: Preflight, run: Run) -> None:
    train(job, run, [Clock(run)])


class Clock(Observer):
    """Wall time, processor time of this rank, and of all processes of the machine; the kernel's work for packets is left out."""

    def __init__(self, run: Run) -> None:
        self._path = run.folder / f"clock-{run.world.rank}.jsonl"

    @contextmanager
    def step(self, state: TrainState) -> Iterator[None]:
        before = _now()
        yield
        wall, mine, every = (now - then for now, then in zip(_now(), before, strict=True))
        with self._path.open("a") as file:
            file.write(json.dumps({"wall_s": wall, "mine_s": mine, "every_s": every}) + "\n")


def _now() -> tuple[float, float, float]:
    user, nice, system, _, _, _, _, stolen = map(int, Path("/proc/stat").read_text().split()[1:9])
    every = (user + nice + system + stolen) / os.sysconf("SC_CLK_TCK")
    return time.perf_counter(), time.process_time(), every


if __name__ == "__main__":
    main()
