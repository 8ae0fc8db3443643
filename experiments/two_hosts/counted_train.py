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
from dataclasses import asdict
from typing import Any

from wire import settled

from tpresearch.launch import Run, entrypoint
from tpresearch.train import loop
from tpresearch.train.preflight import Preflight, preflight
from tpresearch.train.trainer import Trainer

FIRST_PORT = 29500


@entrypoint("train", judge=preflight)
def main(judged: Preflight, run: Run) -> None:
    ranks = list(range(run.world.rank, run.world.rank + run.world.local_size))
    path = run.folder / f"wire-{os.environ['HOST_NAME']}.jsonl"

    class CountedTrainer(Trainer):
        def step(self, step: int, *arguments: Any) -> Any:
            before = settled()
            result = super().step(step, *arguments)
            sent = settled() - before
            if run.world.local_rank == 0:
                with path.open("a") as file:
                    file.write(json.dumps({"step": step + 1, "ranks": ranks, **asdict(sent)}) + "\n")
            return result

    loop.Trainer = CountedTrainer  # everything else is train.py's own
    loop.train(judged, run)


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
