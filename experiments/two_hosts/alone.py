"""Each collective alone between the two hosts over a link of 1 Gbit/s: what it takes, and what the simulator says.

python experiments/two_hosts/alone.py CLUSTER.yaml     # the file of this machine, as for slowed.py; writes alone.csv (record.py says where), prints it
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch.distributed as dist
import yaml

from tpresearch.simulate.cluster import Cluster
from tpresearch.simulate.network import Route, collective_s, network_s, sent_s

sys.path.append(str(Path(__file__).parents[1]))
from record import place, write_rows
from two_hosts.collectives import GROUPS, calls
from two_hosts.hosts import HOSTS, RANKS_PER_HOST, TwoHosts
from two_hosts.slowed import HERE, limit, slowed

RATE = 1e9
SIZES = (1 << 10, 1 << 17, 1 << 19, 1 << 22)
"""Bytes of the tensor, from next to nothing to an FSDP unit of llama2_tiny."""
REPEATS = 24


def main() -> None:
    cluster = slowed(yaml.safe_load(Path(sys.argv[1]).read_text()), RATE)
    with TwoHosts() as hosts, TemporaryDirectory() as folder:
        limit(hosts, f"{RATE:.0f}bit")
        path = Path(folder) / "rows.json"
        hosts.torchrun([__file__, str(path)], Path(folder) / "logs")
        rows: list[dict[str, Any]] = json.loads(path.read_text())
    for row in rows:
        ranks = len(GROUPS[row["groups"]][0])
        predicted = price_ms(row["collective"], row["tensor_bytes"], ranks, cluster)
        row |= {"predicted_ms": round(predicted, 2), "error": f"{predicted / row['measured_ms'] - 1:+.3f}"}
    table = place(HERE) / "alone.csv"
    write_rows(table, rows)
    print(table.read_text())


def price_ms(collective: str, tensor_bytes: int, ranks: int, cluster: Cluster) -> float:
    """What a step is charged for it, as in `simulate.replay`; the ranks of a host share its core."""
    what = collective, tensor_bytes, Route(ranks, max(1, ranks // len(HOSTS))), cluster
    on_network = network_s(*what)
    assert cluster.shared_cores
    slower = max(1.0, RANKS_PER_HOST / cluster.shared_cores * cluster["overlap_slowdown"])
    return 1e3 * sent_s((collective_s(*what) - on_network) * slower, on_network)


def measure(path: Path) -> None:
    """On each rank: the median of the mean over ranks, after a first few."""
    dist.init_process_group("gloo")
    rows = []
    for name, members in GROUPS.items():
        group, _ = dist.new_subgroups_by_enumeration(members)
        assert isinstance(group, dist.ProcessGroup)
        for size in SIZES:
            for collective, call in calls(len(members[0]), group, size).items():
                mine = []
                for _ in range(REPEATS):
                    dist.barrier()
                    before = time.perf_counter()
                    call()
                    mine.append(time.perf_counter() - before)
                of_all: list[list[float]] = [[]] * dist.get_world_size()
                dist.all_gather_object(of_all, mine)
                taken = median(sum(ranks) / len(ranks) for ranks in list(zip(*of_all, strict=True))[4:])
                about = {"groups": name, "collective": collective, "tensor_bytes": size}
                rows.append(about | {"measured_ms": round(1e3 * taken, 2)})
    if dist.get_rank() == 0:
        path.write_text(json.dumps(rows))
    dist.destroy_process_group()


if __name__ == "__main__":
    measure(Path(sys.argv[1])) if "RANK" in os.environ else main()
