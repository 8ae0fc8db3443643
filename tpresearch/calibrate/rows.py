"""Measurements of single ops on a GPU as a cluster's numbers.

A row is {op, shape, us, flops, bytes}: microseconds of one call, and what it computes and moves. What no row tells, such as
links, stays as the base cluster has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from tpresearch.config.errors import ConfigError
from tpresearch.simulate.cluster import LENGTHS

Row = Mapping[str, Any]


def read(path: Path) -> list[Row]:
    """Raises: ConfigError: for a file that is not there, or that has no row with `op` and `us`."""
    if not path.is_file():
        raise ConfigError(
            "rows", str(path), "no such file", "a JSON object per line, with op, shape and us", {}
        )
    rows = [row for line in path.read_text().splitlines() if line.strip() for row in [json.loads(line)]]
    if not any("us" in row for row in rows):
        raise ConfigError(
            "rows", str(path), "it has no measured op", "rows with op, shape, us, flops and bytes", {}
        )
    return rows


def of_rows(rows: Iterable[Row], base: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A cluster's content: the base's, with what these rows measure of the card."""
    rows = list(rows)
    timed = [row for row in rows if "us" in row and row["us"] > 0]
    card = next((row for row in rows if "card" in row), {})
    found = _rates(timed, base) | _bandwidths(timed, base)
    if memory := card.get("memory_bytes"):
        found["memory_gb"] = memory / 1e9
    source = f"tpresearch.calibrate on {card.get('card', 'a GPU')}, torch {_first(rows, 'torch')}"
    numbers = {key: dict(number) for key, number in base["numbers"].items()}
    for key, value in found.items():
        numbers[key] = {"value": value, "kind": "measured", "source": source}
    device = card.get("card", base["device"])
    return {**base, "name": name, "device": device, "checked": [], "numbers": numbers}


def _rates(timed: list[Row], base: Mapping[str, Any]) -> dict[str, Any]:
    """Matmuls under load where a row says so, for a step is that too; attention's table keeps the base's shape over lengths."""
    found: dict[str, Any] = {}
    peak = base["numbers"]["peak_tflops_bfloat16"]["value"] * 1e12
    matmuls = [row for row in timed if row["op"].startswith("matmul") and row["op"] != "matmul sustained"]
    sustained = [row for row in timed if row["op"] == "matmul sustained"]
    if rates := [row["flops"] / row["us"] * 1e6 for row in sustained or matmuls]:
        found["gemm_efficiency"] = median(rates) / peak
    by_length = _attention(timed)
    for way, rates_at in by_length.items():
        table = base["numbers"][f"attention_tflops_{way}"]["value"]
        stated = dict(zip(LENGTHS[-len(table) :], table, strict=True))
        factor = median(rate / 1e12 / stated[length] for length, rate in rates_at if length in stated)
        found[f"attention_tflops_{way}"] = [factor * rate for rate in table]
    return found


def _attention(timed: list[Row]) -> dict[str, list[tuple[int, float]]]:
    """(length, FLOP/s) of the fastest kernel of each shape, forward and backward."""
    fastest: dict[tuple[str, tuple[int, ...]], tuple[float, float]] = {}
    for row in timed:
        if row["op"].startswith("attention") and row["shape"][3] in LENGTHS:
            way = "both" if "backward" in row["op"] else "forward"
            key = way, tuple(row["shape"])
            fastest[key] = min(fastest.get(key, (float("inf"), 0.0)), (row["us"] / 1e6, row["flops"]))
    found: dict[str, list[tuple[int, float]]] = {}
    for (way, shape), (seconds, flops) in fastest.items():
        if way == "forward":
            found.setdefault("forward", []).append((shape[3], flops / seconds))
            if both := fastest.get(("both", shape)):
                found.setdefault("backward", []).append((shape[3], (both[1] - flops) / (both[0] - seconds)))
    return found


def _bandwidths(timed: list[Row], base: Mapping[str, Any]) -> dict[str, float]:
    """Shares of the base's bandwidth, the data sheet's; and the host's time per launch."""
    whole = base["numbers"]["bandwidth_gb_s"]["value"] * 1e9
    moved = {row["op"]: row["bytes"] / row["us"] * 1e6 for row in timed if row.get("bytes")}
    found: dict[str, float] = {}
    elementwise = [moved[op] for op in ("copy", "swiglu compiled") if op in moved]
    if elementwise:
        found["bandwidth_efficiency"] = min(elementwise) / whole
    if "copy" in moved:
        found["copy_efficiency"] = moved["copy"] / whole
    if adamw := [rate for op, rate in moved.items() if op.startswith("adamw")]:
        found["optimizer_efficiency"] = median(adamw) / whole
    if launches := [row["us"] / 100 for row in timed if row["op"] == "100 launches"]:
        found["launch_us"] = launches[0]
    return found


def _first(rows: list[Row], key: str) -> Any:
    return next((row[key] for row in rows if key in row), "unknown")
