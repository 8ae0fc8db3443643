"""Processor time of drawing initial weights, compared with one `normal_` over as many numbers: `python experiments/weights/measure.py`.

Prints a table and writes results.csv (record.py says where). Each case runs in a process of its own, as one rank of a fake process group.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tpresearch.api import load
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.device import FAKE
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.parallel.weights import from_seed, materialize
from tpresearch.plan.initializers import read_initializers
from tpresearch.train.preflight import plan_model

sys.path.append(str(Path(__file__).parents[1]))
from record import place, write_rows

MODEL = ("model=llama2_7b", "tokenizer=bpe_32k", "model.n_layers=1", "data.seq_len=128", "logger=none")
"""llama2_7b with one of its 32 layers, and its embedding and output, all of the true shapes."""
CASES = [
    ("parallel=none", 1, (0,)),
    ("parallel=fsdp", 8, (0, 5, 7)),
    ("parallel=tp", 8, (0, 5, 7)),
    ("parallel=fsdp_tp mesh.tp=4", 8, (0, 5, 7)),
    ("parallel=fsdp_tp mesh.tp=2", 8, (0, 5, 7)),
]
"""Overrides, ranks, and which of the ranks are measured. tp cuts wo and w2 along dim 1."""
REPEATS = 3
BARS = {1: 1.3, 8: 1.5 / 8}


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """(processor time, wall time) of a call, in seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    call()
    return time.process_time() - processor, time.perf_counter() - wall


def normal(numbers: int) -> None:
    torch.empty(numbers).normal_()


def measure(overrides: str, ranks: int, rank: int) -> dict[str, Any]:
    """One rank's initial weights and the one `normal_`, in turns; medians."""
    cfg = load(*MODEL, *overrides.split())
    sizes = validate(cfg, ranks)
    drawn, one_normal = [], []
    numbers = 0
    with process_group(FAKE, World(rank, ranks, rank, ranks)):
        mesh = build_mesh(sizes, "cpu")
        for repeat in range(REPEATS):
            model, plan = plan_model(cfg, sizes)
            numbers = sum(p.numel() for p in model.parameters())
            source = from_seed(read_initializers(model), seed=repeat)
            parallelize(model, plan, cfg.parallel, mesh, cfg.train.dtype)
            drawn.append(seconds(partial(materialize, model, FAKE.torch, source)))
            del model
            one_normal.append(seconds(partial(normal, numbers)))
    (processor_s, wall_s), (normal_s, normal_wall_s) = (
        [statistics.median(column) for column in zip(*rows, strict=True)] for rows in (drawn, one_normal)
    )
    return {
        "plan": overrides,
        "rank": f"{rank} of {ranks}",
        "numbers": numbers,
        "processor_s": round(processor_s, 3),
        "one_normal_processor_s": round(normal_s, 3),
        "ratio": round(processor_s / normal_s, 4),
        "bar": BARS[ranks],
        "wall_s": round(wall_s, 3),
        "one_normal_wall_s": round(normal_wall_s, 3),
    }


def main() -> None:
    about = {
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "command": shlex.join(["python", *sys.argv]),
    }
    rows: list[dict[str, Any]] = []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for overrides, ranks, chosen in CASES:
            for rank in chosen:
                row = pool.apply(measure, (overrides, ranks, rank))
                rows.append(row | about)
                verdict = "ok" if float(row["ratio"]) <= float(row["bar"]) else "above"
                print(
                    f"{row['plan']:28} rank {row['rank']}  processor time {row['ratio']:.3f} of one normal_ "
                    f"(bar {row['bar']:.3f}: {verdict})  wall {row['wall_s']:.2f} s of {row['one_normal_wall_s']:.2f} s",
                    flush=True,
                )
    write_rows(place(Path(__file__).parent) / "results.csv", rows)


if __name__ == "__main__":
    main()
