"""Predictions of training.py's settings by this project's own simulator, written down before they are measured.

    RECORD=1 python experiments/gpu/foresee.py      # adds rows to simulated.csv; those that it has stay as they are

A row per setting and cluster, as conf/cluster has it or as `tpresearch.calibrate` makes it of the rows that it measured (results/): seconds of a step with the range that the simulator states, tokens per second, and the peak
of allocated bytes. `reason` says why a step would not fit the device, or, with these left empty, why it is not simulated.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from gpu import report
from gpu.training import FAMILIES
from record import place, write_rows

from tpresearch.api import load
from tpresearch.calibrate.rows import cluster_from_rows, read_rows
from tpresearch.config import ConfigError
from tpresearch.config.world import World
from tpresearch.launch.composition import read_option
from tpresearch.launch.options import command
from tpresearch.simulate.cluster import Cluster, parse_cluster
from tpresearch.simulate.depth import Recording, recording
from tpresearch.simulate.prediction import Prediction, predict
from tpresearch.simulate.preflight import preflight
from tpresearch.simulate.report import memory_text

HERE = Path(__file__).parent
CLUSTERS = ("h200_dgx", "h100_dgx", "h200_calibrated", "h100_calibrated")
CALIBRATED = "2026-11-27"
"""Day of the rows that `tpresearch.calibrate` measured."""
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
    write_rows(path, rows)
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
