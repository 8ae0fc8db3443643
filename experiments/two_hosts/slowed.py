"""Steps over a rate-limited link between two hosts, predicted before they are run.

python experiments/two_hosts/slowed.py CLUSTER.yaml          # of this machine, by `tpresearch.calibrate`; writes slowed.csv (record.py says where)
python experiments/two_hosts/slowed.py CLUSTER.yaml 1gbit/tp # these rows of it again

`tc` holds what each host sends to 1 Gbit/s, then 100 Mbit/s (a token bucket on the veth pair of hosts.py). Each host has half of
the cores (hosts.py). `alone` is how many steps count: those during which the machine did next to nothing for other processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import yaml

sys.path.append(str(Path(__file__).parents[1]))
from record import place, read_rows, write_rows
from two_hosts.hosts import HOSTS, INTERFACE, RANKS_PER_HOST, HostsUnavailable, TwoHosts

from tpresearch.api import load
from tpresearch.config.validate import validate
from tpresearch.simulate.cluster import Cluster, parse_cluster
from tpresearch.simulate.depth import Recording, recording
from tpresearch.simulate.prediction import predict

HERE = Path(__file__).parent
RATES = {"1gbit": 1e9, "100mbit": 100e6}
PAYLOAD = 1448 / 1514
"""Share of a frame that is not headers: the bucket counts frames."""
PACKET, BURST = 32 << 10, "36kb"
"""The most that the kernel hands over at once, in bytes, and what passes at once after a pause, as no real link lets it: just more
than that, which `tc` would otherwise cut into frames. With half of both the kernel takes more of a core; with twice as much
more passes unhindered."""
STEPS, WARM_UP = 16, 4
OTHERS = 0.05
"""Share of the cores' time that other processes may take of a step that counts."""
COLUMNS = ("link", "parallel", "predicted_s", "measured_s", "error", "alone")
PLANS = ("fsdp_tp", "fsdp", "hsdp", "tp", "sp", "ddp")
COMMON = (
    "model=llama2_tiny",
    "data=random_tokens",
    "data.seq_len=64",
    "train.global_batch_size=8",
    "logger=none",
)
TRAINING_ONLY = (f"train.steps={STEPS}", "train.eval_rows=0", "train.log_every=1", "checkpoint.every=null")


def main() -> None:
    plain = yaml.safe_load(Path(sys.argv[1]).read_text())
    path, wanted = place(HERE) / "slowed.csv", sys.argv[2:]
    before = read_rows(HERE, path.name) if wanted else []
    rows: dict[str, dict[str, Any]] = {f"{row['link']}/{row['parallel']}": row for row in before}
    cases = [(rate, plan) for rate in RATES for plan in PLANS if not wanted or f"{rate}/{plan}" in wanted]
    recorded = {plan: recorded_step(plan) for _, plan in cases}
    predicted = {
        (rate, plan): predict(recorded[plan], slowed(plain, RATES[rate])).step_time_s for rate, plan in cases
    }
    try:
        with TwoHosts() as hosts, TemporaryDirectory() as folder:
            for rate, plan in cases:
                limit(hosts, rate)
                measured, alone = measured_s(hosts, plan, Path(folder) / f"{plan}-{rate}")
                found = row(rate, plan, predicted[rate, plan], measured, alone)
                rows[f"{rate}/{plan}"] = found
                write_rows(path, list(rows.values()))
                print(" ".join(f"{value:>10}" for value in found.values()), flush=True)
    except HostsUnavailable as reason:
        sys.exit(f"two hosts cannot be made here: {reason}")


def slowed(plain: dict[str, Any], bits_per_s: float) -> Cluster:
    """This machine as two hosts: a rank's share of its host's link."""
    share = bits_per_s / 8 / RANKS_PER_HOST / 1e9
    numbers = {name: dict(number) for name, number in plain["numbers"].items()}
    numbers["inter_gb_s"] |= {"value": share}
    numbers["inter_efficiency"] |= {"value": PAYLOAD}
    cores = plain["shared_cores"] / len(HOSTS)
    return parse_cluster(
        {**plain, "numbers": numbers, "devices_per_host": RANKS_PER_HOST, "hosts": 2, "shared_cores": cores}
    )


def recorded_step(plan: str) -> Recording:
    cfg = load(*COMMON, f"parallel={plan}", config_name="simulate")
    return recording(cfg, validate(cfg, 4, len(HOSTS)))


def limit(hosts: TwoHosts, rate: str) -> None:
    """Both ways."""
    for name in hosts.names.values():
        packets = ("ip", "-n", name, "link", "set", "dev", INTERFACE, "gso_max_size", str(PACKET))
        bucket = ("tbf", "rate", rate, "burst", BURST, "latency", "400ms")
        for words in (packets, ("tc", "-n", name, "qdisc", "replace", "dev", INTERFACE, "root", *bucket)):
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise HostsUnavailable(f"`{' '.join(words)}` failed: {done.stderr.strip()}")


def measured_s(hosts: TwoHosts, plan: str, folder: Path) -> tuple[float, int]:
    """The median of the steps that had the machine to themselves, and how many those were; without any, of all. The first
    ones, up to twice as slow, do not count."""
    words = [*COMMON, f"parallel={plan}", *TRAINING_ONLY, f"hydra.run.dir={folder}"]
    hosts.torchrun([str(HERE / "clocked_train.py"), *words], folder.with_suffix(".logs"))
    clocks = [
        [json.loads(line) for line in (folder / f"clock-{rank}.jsonl").read_text().splitlines()]
        for rank in range(len(HOSTS) * RANKS_PER_HOST)
    ]
    steps, alone = [], []
    for ranks in list(zip(*clocks, strict=True))[WARM_UP:]:
        first, cores = ranks[0], len(os.sched_getaffinity(0))
        others_s = first["every_s"] - sum(rank["mine_s"] for rank in ranks)
        steps.append(first["wall_s"])
        if others_s < OTHERS * cores * first["wall_s"]:
            alone.append(first["wall_s"])
    return median(alone or steps), len(alone)


def row(rate: str, plan: str, predicted: float, measured: float, alone: int) -> dict[str, Any]:
    error = f"{predicted / measured - 1:+.3f}"
    values = (rate, plan, round(predicted, 3), round(measured, 3), error, alone)
    return dict(zip(COLUMNS, values, strict=True))


if __name__ == "__main__":
    main()
