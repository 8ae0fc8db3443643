"""`train.py`, with the interface's counters read before and after each step, while all ranks wait.

    torchrun ... counted_train.py "parallel=fsdp train.steps=3" "parallel=tp train.steps=3"

Run by `plans.py` inside the namespaces, one training after another: each in a fork of its own, since importing
torch takes longer than a few steps. Beside its usual files a run leaves `wire-a.jsonl` and `wire-b.jsonl`, a line a
step: which ranks this host has, and what it sent to the other.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from tpresearch.launch import Run, entrypoint
from tpresearch.train.main import train
from tpresearch.train.observe import Observer
from tpresearch.train.preflight import Preflight, preflight
from tpresearch.train.state import TrainState

sys.path.append(str(Path(__file__).parents[1]))
from two_hosts.wire import settled

FIRST_PORT = 29500


@entrypoint("train", preflight=preflight)
def main(job: Preflight, run: Run) -> None:
    train(job, run, [Wire(run)])


class Wire(Observer):
    """Reads the interface before and after each step; one line per step from the first rank of each host."""

    def __init__(self, run: Run) -> None:
        self._first = run.world.local_rank == 0
        self._ranks = list(range(run.world.rank, run.world.rank + run.world.local_size))
        self._path = run.folder / f"wire-{os.environ['HOST_NAME']}.jsonl"

    @contextmanager
    def step(self, state: TrainState) -> Iterator[None]:
        before = settled()
        yield
        sent = settled() - before
        if self._first:
            with self._path.open("a") as file:
                line = {"step": state.step + 1, "ranks": self._ranks, **asdict(sent)}
                file.write(json.dumps(line) + "\n")


def each_in_turn(trainings: list[str]) -> None:
    """Run `main` for each line of overrides.

    The agents' store would still hold the addresses of the training before: each has a store of its own.
    """
    for number, overrides in enumerate(trainings):
        child = os.fork()
        if child == 0:
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(FIRST_PORT + number)}
            sys.argv[1:] = overrides.split()
            return main()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code:
            sys.exit(1)
    return None


if __name__ == "__main__":
    each_in_turn(sys.argv[1:])
