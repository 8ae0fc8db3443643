"""Predict steps on this machine before they are run, then run them: blind predictions for a machine without published measurements.

python -m tpresearch.calibrate out=/tmp/here.yaml
python experiments/cpu_blind/measure.py /tmp/here.yaml     # writes results.csv (record.py says where), prints the table

In wall time, which other work on the machine would lengthen: leave it alone for the four minutes that this takes.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from statistics import mean, median

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

import yaml  # noqa: E402
from record import place  # noqa: E402

from tpresearch.api import load  # noqa: E402
from tpresearch.config import Config  # noqa: E402
from tpresearch.config.validate import validate  # noqa: E402
from tpresearch.config.world import World  # noqa: E402
from tpresearch.simulate.cluster import parse_cluster  # noqa: E402
from tpresearch.simulate.depth import recording  # noqa: E402
from tpresearch.simulate.prediction import predict  # noqa: E402
from tpresearch.verify.ranks import Ranks  # noqa: E402

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
    found = []
    with (place(HERE) / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "plan", "ranks", "rows", "predicted_s", "measured_s", "error"])
        for (model, plan, ranks), cfg, seconds in zip(CASES, configs, predicted, strict=True):
            measured = median(Ranks().run(ranks, trained, cfg)[0])
            error = seconds / measured - 1
            found.append((model, plan, ranks, seconds, measured, error))
            writer.writerow(
                [model, plan, ranks, ROWS[model], f"{seconds:.4f}", f"{measured:.4f}", f"{error:+.3f}"]
            )
            file.flush()
            print(
                f"{model:14}{plan:9}{ranks:>2}  predicted {seconds:7.3f} s  measured {measured:7.3f} s  {error:+.1%}",
                flush=True,
            )
    print(f"mean error {mean(abs(one[-1]) for one in found):.1%}, {order(found)}")


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


def order(found: list[tuple[str, str, int, float, float, float]]) -> str:
    """How many pairs of plans of one model on as many ranks, more than 10 % apart, are in the right order."""
    right = pairs = 0
    for i, one in enumerate(found):
        for other in found[i + 1 :]:
            if one[0] == other[0] and one[2] == other[2] and abs(one[4] / other[4] - 1) > 0.1:
                pairs += 1
                right += (one[3] < other[3]) == (one[4] < other[4])
    return f"{right} of {pairs} pairs that differ by more than 10 % in the right order"


if __name__ == "__main__":
    main()
