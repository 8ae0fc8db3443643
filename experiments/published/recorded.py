"""The steps that stand for a published row, recorded once and priced on any cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from published.configs import Part, parts
from published.engines import as_engine_runs
from published.row import Row
from published.stacks import cluster_of_row

from tpresearch.api import load
from tpresearch.config import Config
from tpresearch.config.axes import MeshSizes
from tpresearch.config.validate import validate
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.simulate.depth import Recording, recording
from tpresearch.simulate.fake_step import record
from tpresearch.simulate.prediction import TIGHT_SHARE, Prediction, predict
from tpresearch.simulate.trace import Trace

HERE = Path(__file__).parent
GIB = 2**30


@dataclass(frozen=True)
class Scored:
    """One row and its prediction."""

    row: Row
    step_s: float
    low_s: float
    high_s: float
    memory_gib: float
    gemm_s: float

    @property
    def error(self) -> float | None:
        """Relative, positive where the prediction is too slow."""
        return self.step_s / self.row.measured_s - 1 if self.row.measured_s else None

    @property
    def is_inside(self) -> bool:
        return bool(self.row.measured_s) and self.low_s <= (self.row.measured_s or 0) <= self.high_s


@dataclass(frozen=True)
class RecordedRow:
    """The steps that stand for a row, to be priced on any cluster."""

    row: Row
    parts: list[Part]
    recordings: list[Recording]

    def on(self, plain: Mapping[str, Any]) -> Scored:
        cluster = parse_cluster(plain)
        # Sums over replicas may lag behind backward by blocks, which two shallow models do not show.
        found = [predict(one, cluster, check=self.row.replicas > 1) for one in self.recordings]
        weights = [part.share or 0.0 for part in self.parts]
        if any(part.share is None for part in self.parts):
            last = _share_that_fits(*found)
            weights = [1 - last, last]

        def blended(values: Sequence[float]) -> float:
            return sum(weight * value for weight, value in zip(weights, values, strict=True))

        return Scored(
            self.row,
            blended([p.step_time_s for p in found]),
            blended([p.low_s for p in found]),
            blended([p.high_s for p in found]),
            blended([(p.peak_bytes - p.memory_bytes["reserved"]) / GIB for p in found]),
            blended([p.time_s.get("gemm", 0.0) for p in found]),
        )


def recorded(row: Row) -> RecordedRow:
    """Raises: ConfigError: for a row whose config is refused, or whose measurement is no number."""
    _ = row.measured_s
    stated, cluster = parts(row), parse_cluster(cluster_of_row(row))

    def record_row(cfg: Config, sizes: MeshSizes, _: object) -> Trace:
        return as_engine_runs(row, record(cfg, sizes))

    configs = [composed(part.overrides) for part in stated]
    hosts = cluster.hosts_of(row.world)
    return RecordedRow(
        row, stated, [recording(cfg, validate(cfg, row.world, hosts), record_row) for cfg in configs]
    )


def composed(overrides: Sequence[str]) -> Config:
    """The config as simulate composes it, with this experiment's models beside the package's; none of the measured
    stacks took its loss in chunks."""
    ours = (f"hydra.searchpath=[file://{HERE / 'conf'}]", "data=random_tokens", "train.loss_chunk=null")
    return load(*ours, *overrides, config_name="simulate")


def _share_that_fits(none: Prediction, full: Prediction) -> float:
    """The smallest share of blocks to checkpoint with which the step fits the card calmly."""
    limit = TIGHT_SHARE * none.cluster["memory_gb"] * 1e9
    saved = none.peak_bytes - full.peak_bytes
    return min(1.0, max(0.0, (none.peak_bytes - limit) / saved)) if saved > 0 else 0.0
