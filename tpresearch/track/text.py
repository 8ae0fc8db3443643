"""Formatting of names, numbers, settings and paths: 1.2 GiB, 34.5k, 1:23. An undefined value is a dash."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tpresearch.config.axes import AXES_OF_DATA_PLAN, TENSOR
from tpresearch.config.choices import Float8, WeightDtype
from tpresearch.config.schema import Config
from tpresearch.launch.hydra_app import launch_dir

UNDEFINED = "–"


def bytes_text(count: float | None) -> str:
    """1536 -> `1.5 KiB`: binary units, three figures at most."""
    if count is None:
        return UNDEFINED
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 999.5 or unit == "TiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 99.95 else f"{count:.1f} {unit}"


def decimal_bytes_text(count: float) -> str:
    """12,340,000,000 -> `12.34 GB`, as a card's memory is told; what that would round away in MB, and kB."""
    size, unit = next(((s, u) for s, u in ((1e9, "GB"), (1e6, "MB")) if count >= 0.1 * s), (1e3, "kB"))
    return f"{count / size:.2f} {unit}"


def figures_text(value: float) -> str:
    """851.23 -> `851`, 1034.2 -> `1,034`: three figures, and all before the point."""
    return f"{value:,.0f}" if abs(value) >= 999.5 else f"{value:.3g}"


def count_text(count: float | None) -> str:
    """34512 -> `34.5k`: decimal thousands, three figures."""
    if count is None:
        return UNDEFINED
    for unit in ("", "k", "M", "G"):
        if abs(count) < 999.5:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{figures_text(count)}T"


def duration_text(seconds: float | None) -> str:
    """83 -> `1:23`, 3723 -> `1:02:03`."""
    if seconds is None:
        return UNDEFINED
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def loss_text(nats: float | None) -> str:
    """6.12345 -> `6.123`; a loss that has become small keeps its figures."""
    if nats is None:
        return UNDEFINED
    return f"{nats:.3f}" if abs(nats) >= 0.1 else f"{nats:.3g}"


def share_text(share: float | None) -> str:
    """0.4712 -> `47.1%`."""
    return UNDEFINED if share is None else f"{100 * share:.1f}%"


def setting_text(value: Any) -> str:
    """A config value as it would be typed, on one line; an unset one is a dash."""
    if value is None:
        return UNDEFINED
    is_json = isinstance(value, bool | list | dict)
    return printable(json.dumps(value, ensure_ascii=False) if is_json else value)


def printable(value: object) -> str:
    """Text on one line, without control characters that a terminal would interpret."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(str(value).split()))


def path_text(path: Path) -> str:
    """A path as it would be typed: from the working directory where it lies below it, else from the root."""
    path, here = path.absolute(), launch_dir()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def run_name(cfg: Config, sizes: Mapping[str, int]) -> str:
    """`llama2_tiny/fsdp2-tp2`: the model, then each part of the plan with its size; `single` for one process.

    A 1D plan is `sp` or `tp`. With a data plan both are written `tp`, as is customary. Narrower weights, moments and matmuls
    than most runs have follow: `llama2_7b/fsdp8-bf16weights-float8rowwise`. An axis that `sizes` lacks has size 1.
    """
    parallel, train, of_moments = cfg.parallel, cfg.train, cfg.optimizer.moment_dtype
    counts = "x".join(str(sizes.get(axis.name, 1)) for axis in AXES_OF_DATA_PLAN[parallel.data])
    data = f"{parallel.data}{counts}" if counts else ""
    tensor = f"{'tp' if data else parallel.tensor}{sizes.get(TENSOR.name, 1)}" if parallel.tensor else ""
    weights = "bf16weights" if train.weights is WeightDtype.bfloat16 else ""
    moments = ""
    if of_moments not in (None, train.weight_dtype):
        moments = "bf16moments" if of_moments is WeightDtype.bfloat16 else "fp32moments"
    float8 = f"float8{train.float8}" if train.float8 is not Float8.none else ""
    layout = "-".join(part for part in (data, tensor) if part) or "single"
    return f"{cfg.model.name}/{'-'.join(part for part in (layout, weights, moments, float8) if part)}"
