"""The predicted time, memory and communication of a step: the content of simulate.json."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tpresearch.config.axes import MeshSizes
from tpresearch.config.schema import Config
from tpresearch.config.validate import micro_batch_size, micro_batches, tokens_per_step
from tpresearch.ledger.entries import MEMORY_KINDS, Entry, MemoryUse
from tpresearch.simulate.cluster import Cluster, SourceKind
from tpresearch.simulate.depth import Recording
from tpresearch.simulate.device_memory import peak_moment
from tpresearch.simulate.fake_ranks import fake_mesh
from tpresearch.simulate.kernels import kernels
from tpresearch.simulate.replay import Span, collective_key, replay
from tpresearch.simulate.trace import Trace

PREDICTED_KINDS = {kind: "other" if kind == "temporaries" else kind for kind in MEMORY_KINDS}
"""Names of the kinds of memory in simulate.json, by those of the ledger."""
RELATIVE_ERRORS = {
    "gemm": 0.07,
    "attention": 0.12,
    "elementwise": 0.15,
    "optimizer": 0.3,
    "copy": 0.2,
    "waiting for the host": 0.3,
    "exposed": 0.3,
    "stragglers": 1.0,
}
"""Relative error of each part of a step: that of prices on published rows (experiments/published)."""
SITE_ERROR = 0.07
"""Relative error from a site's software, clocks and power."""
MAX_SPREAD = 0.10
"""Half of the widest range that is printed."""
TIGHT_SHARE = 0.93
"""Share of a card's memory above which the allocator begins to retry and steps slow down."""


@dataclass(frozen=True)
class Prediction:
    """One config on one cluster."""

    cluster: Cluster
    sizes: MeshSizes
    cfg: Config
    seconds: Mapping[str, float]
    """Those of the step, by the names of `replay`."""
    flops_per_token: float
    """With full attention counted, as in MFU."""
    entries: list[Entry]
    """The communication ledger of the step."""
    memory_bytes: dict[str, int]
    """By kind at the peak; `reserved` is what CUDA, NCCL and the allocator take in addition."""

    @property
    def step_time_s(self) -> float:
        return self.seconds["step"]

    @property
    def low_s(self) -> float:
        return self.step_time_s * (1 - self.spread)

    @property
    def high_s(self) -> float:
        return self.step_time_s * (1 + self.spread)

    @property
    def spread(self) -> float:
        """Half the width of the step time's range, relative to it."""
        if self.is_tight:
            return MAX_SPREAD
        squares = 0.0
        for name, value in self.time_s.items():
            kind = "exposed" if name.startswith("exposed") else name
            squares += (RELATIVE_ERRORS.get(kind, 0.3) * value / self.step_time_s) ** 2
        return min(MAX_SPREAD, math.hypot(SITE_ERROR, math.sqrt(squares)) * _uncertainty(self.cluster))

    @property
    def time_s(self) -> dict[str, float]:
        """Busy time of the device by kind of op, its waiting for the host, and the exposed time of each axis's collectives."""
        found: dict[str, float] = defaultdict(float)
        for name, value in self.seconds.items():
            if name.startswith("exposed/"):
                found[f"exposed {name.split('/')[1]}"] += value
            elif not name.startswith("sent/") and name != "step":
                found[name] += value
        return dict(found)

    @property
    def communication(self) -> list[dict[str, Any]]:
        """The communication ledger of the step, with time_s and exposed_s."""
        return [_entry_json(entry, self.seconds) for entry in self.entries]

    @property
    def tokens_per_second_per_device(self) -> float:
        return tokens_per_step(self.cfg) / self.step_time_s / self.sizes.world

    @property
    def mfu(self) -> float | None:
        """None if the device has no peak to compare with."""
        peak = self.cluster.peak_flops(self.cfg.train.dtype)
        return self.tokens_per_second_per_device * self.flops_per_token / peak if peak else None

    @property
    def peak_bytes(self) -> int:
        return sum(self.memory_bytes.values())

    @property
    def allocated_bytes(self) -> int:
        """The peak of tensors, as a run measures it: on a GPU that of the allocator."""
        return self.peak_bytes - self.memory_bytes["reserved"]

    @property
    def held(self) -> list[MemoryUse]:
        """The memory ledger of the step, at the peak."""
        return [MemoryUse(kind, None, self.memory_bytes[PREDICTED_KINDS[kind]]) for kind in MEMORY_KINDS]

    @property
    def spare_bytes(self) -> float:
        return self.cluster["memory_gb"] * 1e9 - self.peak_bytes

    @property
    def fits(self) -> bool:
        return self.spare_bytes >= 0

    @property
    def is_tight(self) -> bool:
        return self.fits and self.peak_bytes > TIGHT_SHARE * self.cluster["memory_gb"] * 1e9

    @property
    def figures(self) -> dict[str, Any]:
        """What a prediction and a candidate of the planner have alike, by its name in both JSON files."""
        return {
            "step_time_s": self.step_time_s,
            "step_time_range_s": [self.low_s, self.high_s],
            "tokens_per_second_per_device": self.tokens_per_second_per_device,
            "mfu": self.mfu,
            "memory_bytes": {**self.memory_bytes, "peak": self.peak_bytes},
        }

    def as_json(self) -> dict[str, Any]:
        assumptions = {
            name: {"value": number.value, "kind": str(number.kind), "source": number.source}
            for name, number in self.cluster.assumptions()
        }
        return {
            "predicted": True,
            "cluster": self.cluster.name,
            "device": self.cluster.device,
            "world_size": self.sizes.world,
            "mesh": self.sizes.nontrivial(),
            "model": self.cfg.model.name,
            "parallel": self.cfg.parallel.name,
            **self.figures,
            "fits": self.fits,
            "time_s": self.time_s,
            "communication": self.communication,
            "assumptions": assumptions,
            "checked": list(self.cluster.checked),
        }


def predict(recording: Recording, cluster: Cluster, check: bool = True) -> Prediction:
    """Price a recorded config on a cluster.

    Args:
        check: whether the extrapolation from two depths is compared with a third.
    """
    cfg, sizes = recording.cfg, recording.sizes
    count = micro_batches(cfg, sizes)
    with fake_mesh(sizes):  # of all depths that it records
        told = recording.at_full_depth(lambda trace: step_seconds(trace, cfg, sizes, cluster), check)
        held = peak_moment(recording.memory(check), count)
    entries = recording.entries(count)
    return Prediction(
        cluster, sizes, cfg, _positive(told), recording.flops_per_token, entries, _memory(held, cluster)
    )


def _positive(told: Mapping[str, float]) -> dict[str, float]:
    """Seconds of which a wait that each block shortens, extrapolated to less than none, is none; the step takes that much longer."""
    found = {name: max(0.0, seconds) for name, seconds in told.items()}
    waited = [name for name in told if not name.startswith("sent/")]
    return {**found, "step": told["step"] + sum(found[name] - told[name] for name in waited)}


def step_seconds(
    trace: Trace, cfg: Config, sizes: MeshSizes, cluster: Cluster, spans: list[Span] | None = None
) -> dict[str, float]:
    """Seconds of one recorded step on a cluster; see `replay`."""
    parts = [kernels(part, cluster, sizes, cfg.parallel.compile) for part in trace.recorded]
    count = micro_batches(cfg, sizes)
    return replay(parts, count, cluster, sizes.world, spans, cfg.parallel.compile, cfg.parallel.async_tp)


def rows_that_fit(prediction: Prediction) -> int:
    """The most rows per micro-batch that divide a rank's share of the batch and with which the step would fit, activations
    growing as rows do; 0 for none."""
    held, cfg, dp = prediction.memory_bytes, prediction.cfg, prediction.sizes.dp
    rows = micro_batch_size(cfg, prediction.sizes)
    each = (held["activations"] + held["other"]) / rows
    fixed = prediction.peak_bytes - held["activations"] - held["other"]
    spare, share = prediction.cluster["memory_gb"] * 1e9 - fixed, cfg.train.global_batch_size // dp
    return max((n for n in range(1, rows + 1) if share % n == 0 and n * each <= spare), default=0)


def _uncertainty(cluster: Cluster) -> float:
    """A cluster whose rates are guessed is less certain than one that was checked."""
    if cluster.checked:
        return 1.0
    return 1.5 if cluster.numbers["gemm_efficiency"].kind is SourceKind.guessed else 1.2


def _entry_json(entry: Entry, seconds: Mapping[str, float]) -> dict[str, Any]:
    key = collective_key(entry)
    return {
        **asdict(entry),
        "time_s": seconds.get(f"sent/{key}", 0.0),
        "exposed_s": seconds.get(f"exposed/{key}", 0.0),
    }


def _memory(held: Mapping[str, float], cluster: Cluster) -> dict[str, int]:
    found = {PREDICTED_KINDS[kind]: round(held.get(kind, 0)) for kind in MEMORY_KINDS}
    return {**found, "reserved": round(cluster["memory_reserved_gb"] * 1e9)}
