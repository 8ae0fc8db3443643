"""From the command to the end of the first step, 4 ranks: the framework against a hand-written script, alternating.

    python experiments/overhead/startup.py parallel=fsdp_tp

Prints the ratio of processor time, torchrun's and all ranks' together, and appends it to startup.csv (record.py says where).
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from record import place, write_rows

HERE = Path(__file__).parent
RANKS, ROUNDS = 4, 4
"""Of the rounds the first is not counted: it prepares the data, and fills the disk's cache."""


def spent(words: list[str]) -> tuple[float, float]:
    """(processor seconds, wall seconds) of a job under torchrun, whose ranks are its children."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [*command, str(HERE / "first_step.py"), *words],
        check=True,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall


def job_by_hand(overrides: list[str]) -> str:
    """The same plan, mesh, model and batch, as words for the other script."""
    import tpresearch
    from tpresearch.config.world import World
    from tpresearch.train.preflight import preflight

    cfg = tpresearch.load(*overrides)
    sizes = preflight(cfg, World(size=RANKS, local_size=RANKS)).sizes
    mesh = {"replicas": sizes["dp_replicate"], "shards": sizes["dp_shard"], "tp": sizes.tp}
    batch = {"rows": cfg.train.global_batch_size, "seq_len": cfg.data.seq_len}
    return json.dumps({"plan": cfg.parallel.name, **mesh, **batch, "model": cfg.model.args})


def main(overrides: list[str]) -> None:
    import torch

    kinds = {"ours": [*overrides, "logger=none"], "by hand": ["by_hand", job_by_hand(overrides)]}
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for turn in range(ROUNDS):
        for kind in kinds if turn % 2 else reversed(kinds):
            found[kind].append(spent(kinds[kind]))
    (ours, ours_wall), (bare, bare_wall) = (
        [round(statistics.median(column), 2) for column in zip(*found[kind][1:], strict=True)]
        for kind in kinds
    )
    row = {"words": " ".join(overrides), "ranks": RANKS, "ours_cpu_s": ours, "by_hand_cpu_s": bare}
    row |= {"ratio": round(ours / bare, 3), "ours_wall_s": ours_wall, "by_hand_wall_s": bare_wall}
    row |= {"date": date.today().isoformat(), "torch": torch.__version__}
    print(row)
    write_rows(place(HERE) / "startup.csv", [row], append=True)


if __name__ == "__main__":
    main(sys.argv[1:])
