"""A rank that ends after its first step, for startup.py: ours, as `train.py` starts it, or the one written by hand.

torchrun --nproc-per-node=4 experiments/overhead/first_step.py parallel=fsdp_tp
torchrun --nproc-per-node=4 experiments/overhead/first_step.py by_hand '{"plan": "fsdp_tp", "replicas": 1, "shards": 2, "tp": 2, ...}'
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any


def end() -> None:
    """Before anything is cleared up: what is asked for is the time until here."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def by_hand(
    plan: str, replicas: int, shards: int, tp: int, rows: int, seq_len: int, model: dict[str, Any]
) -> float:
    """This rank's loss of a step on random tokens."""
    import torch
    import torch.distributed as dist

    from tpresearch.data.batches import Batch

    sys.path.append(str(Path(__file__).parents[1]))
    from overhead.bare import bare_loop

    dist.init_process_group("gloo")
    torch.manual_seed(0)
    batch = Batch.of(torch.randint(model["vocab_size"], (rows // (replicas * shards), seq_len + 1)))
    return next(bare_loop(plan, replicas, shards, tp, model, None, lambda step: batch, 100, 3e-3, 10, 1.0))


def ours() -> None:
    from tpresearch.launch import Run, entrypoint
    from tpresearch.train.preflight import Preflight, check_folder, preflight, quick_check

    resuming = partial(preflight, resumes=True)

    @entrypoint(
        "train", preflight, check_folder=check_folder, quick_check=quick_check, preflight_resumed=resuming
    )
    def main(job: Preflight, run: Run) -> None:
        from tpresearch.train.main import train
        from tpresearch.train.observe import Observer
        from tpresearch.train.state import TrainState

        class FirstStep(Observer):
            @contextmanager
            def step(self, state: TrainState) -> Iterator[None]:
                yield
                end()

        train(job, run, [FirstStep()])

    main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["by_hand"]:
        by_hand(**json.loads(sys.argv[2]))
        end()
    else:
        ours()
