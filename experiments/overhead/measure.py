"""The framework's step against a hand-written loop with the same model and plan, alternating in one job.

    torchrun --nproc-per-node=4 experiments/overhead/measure.py parallel=fsdp_tp logger=none name=overhead

Prints how many times as long a step of ours takes, and appends the measurement to results.csv (record.py says where).
"""

from __future__ import annotations

import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tpresearch.data.pipeline import prepare
from tpresearch.launch import Run, entrypoint
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh, data_rank
from tpresearch.parallel.norm import local_shard
from tpresearch.track.tracker import RunFacts, Tracker
from tpresearch.train.assemble import assemble
from tpresearch.train.loop import Loop
from tpresearch.train.main import build_observers
from tpresearch.train.preflight import Preflight, preflight

sys.path.append(str(Path(__file__).parents[1]))
from overhead.bare import bare_loop
from record import place, write_rows

WARM_UP = 3
"""Steps of each loop before anything is timed: ours counts what it sends in the second."""
BLOCK = 2
"""Steps before it is the other loop's turn."""
ROUNDS = 12
"""Pairs of blocks: ours first in the even ones, last in the odd ones."""


@entrypoint("train", preflight=preflight)
def main(job: Preflight, run: Run) -> None:
    cfg = job.cfg
    steps = WARM_UP + ROUNDS * BLOCK
    cfg.train.steps, cfg.train.eval_every = steps + 1, None  # the last one, which evaluates, is never reached
    assert job.device
    sizes, device = job.sizes, job.device
    corpus = prepare(cfg.data, cfg.tokenizer, run.world)
    with process_group(device, run.world):
        mesh = build_mesh(sizes, device.type)
        observers = build_observers(job, mesh, device, None)
        loop = assemble(job, mesh, device, corpus, observers)
        model = loop.state.model
        facts = RunFacts(run.world.size, sizes.nontrivial(), job.parameters, device.name)
        first = run.world.rank == 0
        tracker = Tracker(cfg, run.folder, facts, steps + 1) if first else None
        weights = [local_shard(p.detach())[0].clone() for p in model.parameters()]
        bare = bare_loop(
            cfg.parallel.name,
            sizes["dp_replicate"],
            sizes["dp_shard"],
            sizes.tp,
            cfg.model.args,
            weights,
            lambda step: loop.batches.batch(step, data_rank(mesh), sizes.dp),
            steps + 1,
            cfg.optimizer.lr,
            cfg.schedule.warmup_steps,
            cfg.train.clip_grad_norm or float("inf"),
        )
        with tracker or nullcontext():
            result = alternate(ours(loop, tracker), bare.__next__)
        if first:
            about = {"parallel": cfg.parallel.name, "ranks": run.world.size, "model": cfg.model.name}
            report(about | result)


def ours(loop: Loop, tracker: Tracker | None) -> Callable[[], float]:
    """One step of ours with its logged row: on disk, in W&B if it is on, and on the terminal."""
    rows = loop.rows()

    def step() -> float:
        row = next(rows)
        if tracker:
            tracker.log(row)
        assert row["train/loss"] is not None
        return row["train/loss"]

    return step


def alternate(ours: Callable[[], float], bare: Callable[[], float]) -> dict[str, Any]:
    """Time both loops in turns. Returns medians a step, and the ratio of neighbouring blocks with its spread."""
    losses = {"ours": 0.0, "bare": 0.0}
    wall: dict[str, list[float]] = {"ours": [], "bare": []}
    cpu: dict[str, list[float]] = {"ours": [], "bare": []}

    def block(name: str, step: Callable[[], float], count: int) -> tuple[float, float]:
        dist.barrier()
        began, used = time.perf_counter(), time.process_time()
        for _ in range(count):
            losses[name] = step()
        used = time.process_time() - used
        dist.barrier()
        return (time.perf_counter() - began) / count, used / count

    block("ours", ours, WARM_UP)
    block("bare", bare, WARM_UP)
    for turn in range(ROUNDS):
        pair = [("ours", ours), ("bare", bare)]
        for name, step in pair if turn % 2 == 0 else reversed(pair):
            seconds, used = block(name, step, BLOCK)
            wall[name].append(seconds)
            cpu[name].append(used)
    mean_bare = torch.tensor(losses["bare"], dtype=torch.float64)  # equal numbers of tokens a rank
    dist.all_reduce(mean_bare)
    ratios = [a / b for a, b in zip(wall["ours"], wall["bare"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {
        "ours_ms": round(1e3 * statistics.median(wall["ours"]), 1),
        "bare_ms": round(1e3 * statistics.median(wall["bare"]), 1),
        "ratio": round(middle, 4),
        "ratio_quartile_1": round(low, 4),
        "ratio_quartile_3": round(high, 4),
        "cpu_ratio": round(sum(cpu["ours"]) / sum(cpu["bare"]), 4),
        "loss_ours": losses["ours"],
        "loss_bare": mean_bare.item() / dist.get_world_size(),
    }


def report(result: dict[str, Any]) -> None:
    print(
        f"{result['parallel']} on {result['ranks']} ranks: ours {result['ours_ms']} ms, "
        f"bare {result['bare_ms']} ms, ratio {result['ratio']} "
        f"(half of the {ROUNDS} pairs within {result['ratio_quartile_1']} to {result['ratio_quartile_3']}), "
        f"CPU time {result['cpu_ratio']}; loss {result['loss_ours']:.5f} and {result['loss_bare']:.5f}"
    )
    command = shlex.join(["experiments/overhead/measure.py", *sys.argv[1:]])
    whole = result | {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads_a_rank": torch.get_num_threads(),
        "command": command,
    }
    write_rows(place(Path(__file__).parent) / "results.csv", [whole], append=True)


if __name__ == "__main__":
    main()
