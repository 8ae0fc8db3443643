"""Predict steps on this machine before they are run, then run them: blind predictions for a machine without published measurements.

python -m tpresearch.calibrate out=/tmp/here.yaml
python experiments/cpu_blind/measure.py /tmp/here.yaml     # writes results.csv (record.py says where), prints the table

In wall time, which other work on the machine would lengthen: leave it alone for the four minutes that this takes.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
import yaml
from record import place, write_rows

from tpresearch.api import load
from tpresearch.config import Config
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.simulate.depth import recording
from tpresearch.simulate.prediction import predict
from tpresearch.verify.ranks import Ranks

HERE = Path(__file__).parent
COMMON = ("data=random_tokens", "logger=none", "data.seq_len=128", "train.eval_rows=0")
ROWS = {"llama2_tiny": 8, "llama2_small": 4}
"""Of the global batch, by model."""
PLANS = {1: ("none",), 2: ("ddp", "fsdp", "tp", "sp"), 4: ("ddp", "fsdp", "hsdp", "tp", "sp", "fsdp_tp")}
"""By ranks: every plan that they can be arranged for."""
CASES = [(model, plan, ranks) for model in ROWS for ranks, plans in PLANS.items() for plan in plans]
STEPS = {"llama2_tiny": (5, 15), "llama2_small": (2, 4)}
"""The first steps, which allocate memory and load libraries, and those after them, whose median counts."""


def main() -> None:
    cluster = parse_cluster(yaml.safe_load(Path(sys.argv[1]).read_text()))
    configs = [
        load(f"model={model}", f"parallel={plan}", f"train.global_batch_size={ROWS[model]}", *COMMON)
        for model, plan, _ in CASES
    ]
    predicted = [
        predict(recording(cfg, validate(cfg, ranks)), cluster).step_time_s
        for cfg, (_, _, ranks) in zip(configs, CASES, strict=True)
    ]
    found: list[dict[str, Any]] = []
    for (model, plan, ranks), cfg, seconds in zip(CASES, configs, predicted, strict=True):
        measured = median(Ranks().run(ranks, trained, cfg)[0])
        row = {"model": model, "plan": plan, "ranks": ranks, "rows": ROWS[model]}
        row |= {"predicted_s": round(seconds, 4), "measured_s": round(measured, 4)}
        found.append(row | {"error": round(seconds / measured - 1, 3)})
        print(*(f"{key} {value}" for key, value in found[-1].items()), sep="  ", flush=True)
        write_rows(place(HERE) / "results.csv", found)
    print(f"mean error {mean(abs(row['error']) for row in found):.1%}, {order(found)}")


def trained(world: World, cfg: Config) -> list[float]:
    """Wall time of each step after the first ones."""
    import torch

    from tpresearch.data.pipeline import prepare
    from tpresearch.parallel.group import process_group
    from tpresearch.parallel.mesh import build_mesh
    from tpresearch.train.assemble import assemble
    from tpresearch.train.preflight import preflight

    torch.set_num_threads(1)
    job = preflight(cfg, world)
    assert job.device
    times = []
    with process_group(job.device, world):
        loop = assemble(job, build_mesh(job.sizes, "cpu"), job.device, prepare(cfg.data, cfg.tokenizer))
        for _ in range(sum(STEPS[cfg.model.name])):
            before = time.perf_counter()
            loop.step()
            times.append(time.perf_counter() - before)
    return times[STEPS[cfg.model.name][0] :]


def order(found: list[dict[str, Any]]) -> str:
    """How many pairs of plans of one model on as many ranks, more than 10 % apart, are in the right order."""
    pairs = [
        (one, other)
        for one, other in itertools.combinations(found, 2)
        if (one["model"], one["ranks"]) == (other["model"], other["ranks"])
        and abs(one["measured_s"] / other["measured_s"] - 1) > 0.1
    ]
    keys = ("predicted_s", "measured_s")
    right = sum(len({one[key] < other[key] for key in keys}) == 1 for one, other in pairs)
    return f"{right} of {len(pairs)} pairs that differ by more than 10 % in the right order"


if __name__ == "__main__":
    main()
