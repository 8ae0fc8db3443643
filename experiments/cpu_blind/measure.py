"""Predict steps on this machine before they are run, then run them: the simulator on a machine that nobody published.

python -m tpresearch.calibrate out=/tmp/here.yaml
python experiments/cpu_blind/measure.py /tmp/here.yaml     # writes results.csv beside this file, prints the table

In processor time of a rank's main thread, in which torch computes forward and backward on a CPU: what gloo's own threads copy, and
what a rank waits for others on shared cores, is left out on both sides.
"""

from __future__ import annotations

import csv
import dataclasses
import sys
import time
from pathlib import Path
from statistics import mean

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1]))

from tpresearch.api import load  # noqa: E402
from tpresearch.config import Config  # noqa: E402
from tpresearch.config.validate import validate  # noqa: E402
from tpresearch.config.world import World  # noqa: E402
from tpresearch.simulate.cluster import Cluster, Kind, Number, cluster_of  # noqa: E402
from tpresearch.simulate.depth import recording  # noqa: E402
from tpresearch.simulate.fake_step import record  # noqa: E402
from tpresearch.simulate.prediction import predict  # noqa: E402
from tpresearch.verify.ranks import Ranks  # noqa: E402

COMMON = ("data=random_tokens", "logger=none", "data.seq_len=128", "train.eval_rows=0")
CASES = [
    ("llama2_tiny", plan, ranks, 8)
    for plan, ranks in [
        ("none", 1),
        ("ddp", 2),
        ("fsdp", 2),
        ("tp", 2),
        ("sp", 2),
        ("fsdp", 4),
        ("tp", 4),
        ("fsdp_tp", 4),
        ("hsdp", 4),
    ]
] + [("llama2_small", plan, ranks, 2) for plan, ranks in [("none", 1), ("fsdp", 2), ("tp", 2), ("sp", 2)]]
"""(model, plan, ranks, rows of the global batch)"""
STEPS = 3
"""Of which the first warms up, and the least of the others counts: interruptions only add."""


def main() -> None:
    cluster = cluster_of(yaml.safe_load(Path(sys.argv[1]).read_text()))
    configs = [
        load(f"model={model}", f"parallel={plan}", f"train.global_batch_size={rows}", *COMMON)
        for model, plan, _, rows in CASES
    ]
    predicted = [foretold(cfg, ranks, cluster) for cfg, (_, _, ranks, _) in zip(configs, CASES, strict=True)]
    found = []
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "plan", "ranks", "rows", "predicted_s", "measured_s", "error"])
        for (model, plan, ranks, rows), cfg, seconds in zip(CASES, configs, predicted, strict=True):
            measured = max(Ranks().run(ranks, trained, cfg))
            error = seconds / measured - 1
            found.append((model, plan, ranks, seconds, measured, error))
            writer.writerow([model, plan, ranks, rows, f"{seconds:.4f}", f"{measured:.4f}", f"{error:+.3f}"])
            file.flush()
            print(
                f"{model:14}{plan:9}{ranks:>2}  predicted {seconds:7.3f} s  measured {measured:7.3f} s  {error:+.1%}",
                flush=True,
            )
    print(f"mean error {mean(abs(one[-1]) for one in found):.1%}, {order(found)}")


def foretold(cfg: Config, ranks: int, cluster: Cluster) -> float:
    """Predicted processor time of a rank's main thread: all but what its collectives copy."""
    sizes = validate(cfg, ranks)
    free = {
        name: Number(value, Kind.guessed, "not counted here")
        for name, value in (("intra_gb_s", 1e9), ("collective_us", 0.0))
    }
    alone = dataclasses.replace(cluster, shared_cores=8, numbers={**cluster.numbers, **free})
    return predict(recording(cfg, sizes, record), alone).step_time_s


def trained(world: World, cfg: Config) -> float:
    """Processor time of this thread in a step."""
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
        for _ in range(STEPS):
            before = time.thread_time()
            loop.step()
            times.append(time.thread_time() - before)
    return min(times[1:])


def order(found: list[tuple]) -> str:
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
