"""Predictions of training.py's settings by this project's own simulator, written down before they are measured.

    RECORD=1 python experiments/gpu/foresee.py      # adds rows to simulated.csv; those that it has stay as they are

A row per setting and cluster, as conf/cluster has it or as `tpresearch.calibrate` makes it of the rows that it measured (results/): seconds of a step with the range that the simulator states, tokens per second, and the peak
of allocated bytes. `reason` says why a step would not fit the device, or, with these left empty, why it is not simulated.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from gpu import report  # noqa: E402
from gpu.training import FAMILIES  # noqa: E402
from record import place  # noqa: E402

from tpresearch.api import load  # noqa: E402
from tpresearch.calibrate.rows import cluster_from_rows, read_rows  # noqa: E402
from tpresearch.config import ConfigError  # noqa: E402
from tpresearch.config.world import World  # noqa: E402
from tpresearch.launch.composition import read_option  # noqa: E402
from tpresearch.launch.options import command  # noqa: E402
from tpresearch.simulate.cluster import Cluster, parse_cluster  # noqa: E402
from tpresearch.simulate.depth import Recording, recording  # noqa: E402
from tpresearch.simulate.prediction import Prediction, predict  # noqa: E402
from tpresearch.simulate.preflight import preflight  # noqa: E402
from tpresearch.simulate.report import memory_text  # noqa: E402

CLUSTERS = ("h200_dgx", "h100_dgx", "h200_calibrated", "h100_calibrated")
CALIBRATED = "2026-11-27"
"""Day of the rows that `tpresearch.calibrate` measured."""
COLUMNS = (
    "id",
    "cluster",
    "step_s",
    "low",
    "high",
    "tokens_per_s",
    "memory_bytes",
    "reason",
    "date",
    "overrides",
)
Row = dict[str, str]


def main() -> None:
    path = place(HERE) / "simulated.csv"
    words = {
        name: (*overrides, *of_setting)
        for overrides, settings in FAMILIES.values()
        for name, of_setting in settings.items()
    }
    # Not those of a setting that has changed since under its name.
    rows = [
        row
        for row in report.read_simulated()
        if row["id"] not in words or row["overrides"] == " ".join(words[row["id"]])
    ]
    done = {(row["id"], row["cluster"]) for row in rows}
    for name, overrides in words.items():
        for row in foresee(name, overrides, (c for c in CLUSTERS if (name, c) not in done)):
            print(row, flush=True)
            rows.append(row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(path)


def foresee(name: str, overrides: Sequence[str], clusters: Iterable[str]) -> Iterator[Row]:
    """A row per cluster; its step is recorded once, as only prices differ."""
    recorded: Recording | None = None
    for cluster in clusters:
        row = {
            "id": name,
            "cluster": cluster,
            "date": date.today().isoformat(),
            "overrides": " ".join(overrides),
        }
        words = (*overrides, "world_size=1", f"cluster={cluster.replace('calibrated', 'dgx')}")
        try:
            job = preflight(load(*words, config_name="simulate"), World())
            recorded = recorded or recording(job.cfg, job.sizes)
            priced = calibrated(cluster) if cluster.endswith("calibrated") else job.cluster
            yield row | numbers(predict(recorded, priced))
        except ConfigError as error:
            yield row | {"reason": str(error).splitlines()[0]}


def calibrated(cluster: str) -> Cluster:
    """The cluster that `python -m tpresearch.calibrate rows=...` writes for the rows that it measured on such a card."""
    card = cluster.partition("_")[0]
    rows = read_rows(HERE / "results" / f"{card}-{CALIBRATED}-calibrate.jsonl")
    return parse_cluster(cluster_from_rows(rows, read_option("cluster", f"{card}_dgx"), cluster))


def numbers(prediction: Prediction) -> Row:
    return {
        "step_s": f"{prediction.step_time_s:.4f}",
        "low": f"{prediction.low_s:.4f}",
        "high": f"{prediction.high_s:.4f}",
        "tokens_per_s": f"{prediction.tokens_per_second_per_device:.0f}",
        "memory_bytes": str(prediction.allocated_bytes),
        "reason": "" if prediction.fits else memory_text(prediction),
    }


if __name__ == "__main__":
    command(main)
