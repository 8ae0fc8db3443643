"""Bytes between two hosts in a step, by plan: the interfaces' counters and the ledger.

    python experiments/two_hosts/measure.py [--draw-only]

Needs Linux, root and iproute2. Writes collectives.csv, results.csv and between_hosts.png (record.py says where), and prints the tables.
"""

from __future__ import annotations

import json
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1]))
from record import place, read_rows, write_rows
from two_hosts.draw import draw
from two_hosts.formulas import TUTORIAL
from two_hosts.hosts import HostsUnavailable, TwoHosts
from two_hosts.plans import train_counted

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHORT = ["train.steps=3", "train.eval_rows=8", "logger=none", "device=cpu"]


@dataclass(frozen=True)
class Case:
    parallel: str
    rows: int
    """Of the global batch, of 256 tokens each."""

    @property
    def overrides(self) -> list[str]:
        return [f"parallel={self.parallel}", f"train.global_batch_size={self.rows}", *TUTORIAL, *SHORT]


CASES = [Case("fsdp_tp", 16), Case("fsdp", 32), Case("hsdp", 32), Case("tp", 8)]
"""8 rows a data-parallel rank, as in the tutorial, on the meshes that `mesh=auto` makes of two hosts of 2 ranks."""
CASES += [Case("fsdp_tp", 32), Case("tp", 32)]
"""All four plans on one global batch."""


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the namespaces are removed then too
    if "--draw-only" not in sys.argv:
        # The namespaces have no network, and ranks should not wait for each other's data.
        subprocess.run([sys.executable, "-m", "tpresearch.prepare", *TUTORIAL[2:]], check=True, cwd=ROOT)
        try:
            with TwoHosts() as hosts, tempfile.TemporaryDirectory() as folder:
                measure_collectives(hosts, Path(folder))
                print("training under each plan: minutes", flush=True)
                measure_plans(hosts, Path(folder, "plans"))
        except HostsUnavailable as error:
            sys.exit(f"error: two hosts cannot be made here: {error}; it takes Linux, root and iproute2")
    draw(read_rows(HERE, "results.csv"), place(HERE) / "between_hosts.png")
    print_tables()


def measure_collectives(hosts: TwoHosts, folder: Path) -> None:
    """collectives.csv: each of the three collectives alone."""
    hosts.torchrun([str(HERE / "collectives.py"), str(folder / "rows.json")], folder)
    rows = json.loads((folder / "rows.json").read_text())
    write_rows(place(HERE) / "collectives.csv", [row | versions() for row in rows])


def measure_plans(hosts: TwoHosts, folder: Path) -> None:
    """results.csv: a row a case, step and direction."""
    folder.mkdir()
    measured = train_counted(hosts, [case.overrides for case in CASES], folder)
    rows = []
    for case, steps in zip(CASES, measured, strict=True):
        rows += [step.row() | {"overrides": " ".join(case.overrides)} | versions() for step in steps]
    write_rows(place(HERE) / "results.csv", rows)


def versions() -> dict[str, str]:
    return {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "linux": platform.release().partition("-")[0],
        "command": "python experiments/two_hosts/measure.py",
    }


def print_tables() -> None:
    print("\n| collective | over | by the ring formula | counted | ratio |\n|---|---|---|---|---|")
    for row in read_rows(HERE, "collectives.csv"):
        if row["host"] == "a":
            counted, ring = (int(row[key]) / 1e6 for key in ("payload_bytes", "ring_bytes"))
            name, over = row["collective"], row["groups"]
            print(f"| {name} | {over} | {ring:.2f} MB | {counted:.2f} MB | {counted / ring:.4f} |")
    print(
        "\n| `parallel=` | mesh | rows | ledger, rings | ledger, as gloo sends | counted | payload "
        "| payload / ledger, min to max |\n|---|---|---|---|---|---|---|---|"
    )
    results = read_rows(HERE, "results.csv")
    for case in CASES:
        rows = [r for r in results if (r["parallel"], r["rows"]) == (case.parallel, str(case.rows))]
        columns = ("ledger_ring_bytes", "ledger_gloo_bytes", "tx_bytes", "payload_bytes")
        means = [f"{statistics.fmean(int(row[key]) for row in rows) / 1e6:.2f} MB" for key in columns]
        ratios = sorted(float(row["ratio"]) for row in rows)
        cells = [f"`{case.parallel}`", rows[0]["mesh"], str(case.rows), *means]
        print(f"| {' | '.join(cells)} | {ratios[0]:.4f} to {ratios[-1]:.4f} |")


if __name__ == "__main__":
    main()
