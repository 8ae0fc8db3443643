"""The same bytes with no ranks at all: the ledger's closed formulas, for any model, plan and number of hosts' ranks.

    python experiments/two_hosts/formulas.py

Prints what the tutorial's model sends between two hosts of 2 ranks and Llama2-7B between two of 8, by the ring
formulas (as NCCL's rings do), and for how long that keeps two kinds of link busy.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tpresearch.api import load
from tpresearch.config.axes import MeshSizes
from tpresearch.config.validate import validate
from tpresearch.ledger.entries import Entry
from tpresearch.ledger.formulas import expected_entries
from tpresearch.train.preflight import plan_model

sys.path.append(str(Path(__file__).parents[1]))
from two_hosts.inter_host import crossing_hops, gloo_bytes_each_way, ring_bytes_each_way

LINKS = {"100 Gb/s": 100e9 / 8, "3.2 Tb/s": 3.2e12 / 8}
"""Of a whole host, each way, in bytes a second: one Ethernet card, or eight of 400 Gb/s."""
TUTORIAL = ["model=llama2_tiny", "model.vocab_size=32000", "data.seq_len=256"]
"""The tutorial's 2D model, of 18,089,216 parameters. The tokenizer is smaller, and with it the ids."""
LLAMA2_7B = ["model=llama2_7b", "tokenizer=bpe_32k", "data.seq_len=4096", "train.dtype=bfloat16"]


def entries_of_step(overrides: list[str], ranks_per_host: int) -> tuple[list[Entry], MeshSizes]:
    """Rank 0's ledger of one step on two hosts, on the mesh that the plan chooses for them."""
    cfg = load(*overrides, "logger=none")
    sizes = validate(cfg, 2 * ranks_per_host, hosts=2)
    entries = expected_entries(*plan_model(cfg, sizes), cfg)
    assert entries is not None, f"no formula for {overrides}"
    return entries, sizes


def each_way(overrides: list[str], ranks_per_host: int, gloo: bool) -> int:
    """Bytes a step from one host to the other."""
    entries, sizes = entries_of_step(overrides, ranks_per_host)
    host_of = ["a"] * ranks_per_host + ["b"] * ranks_per_host
    count = gloo_bytes_each_way if gloo else ring_bytes_each_way
    return count(entries, crossing_hops(sizes.nontrivial(), host_of))


def main() -> None:
    print_table(TUTORIAL, ranks_per_host=2, batches=(8, 32))
    print_table(LLAMA2_7B, ranks_per_host=8, batches=(16, 64))


def print_table(model: list[str], ranks_per_host: int, batches: tuple[int, ...]) -> None:
    titles = ["rows", "`parallel=`", "mesh", "collectives that cross", "each way"]
    titles += [f"at {name}" for name in LINKS]
    print(f"\n{' '.join(model)}\n\n| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for rows in batches:
        for parallel in ("fsdp_tp", "hsdp", "fsdp", "tp"):
            overrides = [f"parallel={parallel}", f"train.global_batch_size={rows}", *model]
            entries, sizes = entries_of_step(overrides, ranks_per_host)
            hops = crossing_hops(sizes.nontrivial(), ["a"] * ranks_per_host + ["b"] * ranks_per_host)
            sent = ring_bytes_each_way(entries, hops)
            cells = [
                str(rows),
                f"`{parallel}`",
                " ".join(f"{axis}={size}" for axis, size in sizes.nontrivial().items()),
                str(sum(entry.count for entry in entries if hops[entry.axis])),
                f"{sent / 1e9:.1f} GB" if sent > 1e9 else f"{sent / 1e6:.1f} MB",
                *(f"{1e3 * sent / speed:,.1f} ms" for speed in LINKS.values()),
            ]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
