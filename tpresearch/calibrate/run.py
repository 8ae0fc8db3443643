"""A cluster's rates from one measured run: the factor with which its step is predicted as it was measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tpresearch.config.compose import to_config
from tpresearch.config.errors import ConfigError, format_value, one_line
from tpresearch.config.schema import MAX_RANKS, ComposedConfig, Config
from tpresearch.config.values import AtLeast, Within
from tpresearch.config.world import World
from tpresearch.simulate.cluster import TABLES, parse_cluster
from tpresearch.simulate.depth import recording
from tpresearch.simulate.prediction import predict
from tpresearch.simulate.preflight import preflight
from tpresearch.track.record import read_record

SHARES = ("gemm_efficiency", "bandwidth_efficiency")
"""Of what data sheets state of a GPU."""
OF_A_CORE = ("peak_tflops_float32", "peak_tflops_bfloat16", "peak_tflops_float64", "bandwidth_gb_s")
"""Of a CPU, whose shares are 1."""
RANKS = AtLeast(1, MAX_RANKS)
SECONDS = Within(0, 1e9, open_below=True)
"""Of a step: beyond them, the record is damaged."""
LEAST, MOST = 1 / 8, 8.0
"""Factors to look between, unless one means more than a GPU's peak."""
PRECISION = 1e-3


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
    folder: Path
    name: str
    device: str
    step_s: float
    """Median of its timed steps."""
    cfg: Config


def read_run(folder: Path) -> MeasuredRun:
    """A run that has ended, from its record.

    Raises:
        ConfigError: for a folder that is no run's, for a prediction, and for a run with no timed step.
    """
    try:
        summary, config = (read_record(folder / name) for name in ("summary.json", "config.yaml"))
        schema = OmegaConf.structured(ComposedConfig)
        merged = OmegaConf.merge(schema, config)
        assert isinstance(merged, DictConfig)
        cfg = to_config(merged)
        step_s, world = summary.get("perf/step_time_s"), summary["world_size"]
        if type(world) is not int or world not in RANKS:
            raise ValueError(f"its world_size is {format_value(world)}")
        name, device = str(summary["run_name"]), str(summary["device"])
    except (
        OSError,
        ValueError,
        OverflowError,
        KeyError,
        TypeError,
        AttributeError,
        OmegaConfBaseException,
    ) as error:
        why = f"not the folder of a run that has ended ({one_line(error)})"
        raise _refusal(folder, why) from error
    if summary.get("predicted"):
        raise _refusal(folder, "it is a prediction, and nothing was measured")
    if type(step_s) not in (int, float) or step_s not in SECONDS:
        raise _refusal(folder, "none of its steps was timed")
    return MeasuredRun(folder, name, device, step_s, dataclasses.replace(cfg, world_size=world))


def cluster_from_run(run: MeasuredRun, base: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A cluster file's content: the base's, with its rates scaled by one factor.

    Raises:
        ConfigError: if the base could not have made this run, or with no factor its step.
    """
    job = preflight(dataclasses.replace(run.cfg, cluster=dict(base)), World())
    recorded = recording(job.cfg, job.sizes)

    def step_s(factor: float) -> float:
        return predict(recorded, parse_cluster(scaled(base, factor))).step_time_s

    factor = fitted_factor(step_s, base, run.step_s)
    if factor is None:
        low, high = _bounds(base)
        why = (
            f"a step took {run.step_s:.4g} s, which no rates between {low:.2g} and {high:.2g} times those of {base['name']} make"
            f" ({step_s(high):.4g} to {step_s(low):.4g} s): it waits for something else, or it ran on another device"
        )
        raise _refusal(run.folder, why)
    source = f"so that a step of {run.folder.name} ({run.name}) is predicted as measured, {run.step_s:.4g} s"
    plain = scaled(base, factor)
    for key in _rates(base):
        plain["numbers"][key] |= {"kind": "fitted", "source": source}
    off = step_s(1.0) / run.step_s - 1
    ranks = f"{job.sizes.world} rank" + "s" * (job.sizes.world > 1)
    checked = f"{run.name} on {ranks} (fitted): with the rates of {base['name']} {off:+.1%}, here times {factor:.3g}"
    return {**plain, "name": name, "checked": [checked]}


def fitted_factor(
    step_s: Callable[[float], float], base: Mapping[str, Any], measured_s: float
) -> float | None:
    """The factor on the base's rates with which a step takes as long as was measured; None if none does.

    Args:
        step_s: the predicted step by that factor.
    """
    low, high = _bounds(base)
    if not step_s(high) <= measured_s <= step_s(low):
        return None
    while high / low > 1 + PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if step_s(middle) > measured_s else (low, middle)
    return math.sqrt(low * high)


def _bounds(base: Mapping[str, Any]) -> tuple[float, float]:
    shares = [base["numbers"][key]["value"] for key in SHARES if key in _rates(base)]
    return LEAST, min([MOST, *(1 / share for share in shares)])


def _rates(base: Mapping[str, Any]) -> tuple[str, ...]:
    """Numbers that a device's clock and its software change together."""
    return (*(OF_A_CORE if base.get("shared_cores") else SHARES), *TABLES)


def scaled(base: Mapping[str, Any], factor: float) -> dict[str, Any]:
    """The base with its rates times the factor."""
    numbers = {key: dict(number) for key, number in base["numbers"].items()}
    for key in _rates(base):
        value = numbers[key]["value"]
        numbers[key]["value"] = [r * factor for r in value] if isinstance(value, list) else value * factor
    return {**base, "numbers": numbers}


def _refusal(folder: Path, why: str) -> ConfigError:
    return ConfigError("run", str(folder), why, "the folder of a training run that was measured", {})
