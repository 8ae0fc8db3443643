"""Measurements of single ops on a GPU as a cluster's numbers.

A row is {op, shape, us, flops, bytes}: microseconds of one call, and what it computes and moves. Numbers that no row
determines, such as those of links that only one GPU has, are the base cluster's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

from tpresearch.config.errors import ConfigError
from tpresearch.config.values import check_value
from tpresearch.simulate.cluster import LENGTHS
from tpresearch.simulate.network import PROTOCOLS
from tpresearch.simulate.prices import ADAMW_BFLOAT16

Row = Mapping[str, Any]
IN_A_STEP = 1.028
"""Rate of a step's matmuls relative to one that runs without pause: between them come ops that take less power. On two H200 a step
of Llama-3-8B had 677 and 699 TFLOP/s, the matmul of 8192^3 under load 653 and 686 (experiments/gpu)."""
IN_A_HOST, ACROSS_HOSTS = "in a host", "across hosts"
"""How the op of a collective's row ends: `all_gather in a host`, of shape (bytes of the whole tensor, ranks)."""
CALIBRATED = "tpresearch.calibrate on"
"""How the source of a number begins that is measured, other than one of the base."""
LEGAL = "a JSON object per line, with op, shape, us, flops and bytes"
MEASURED = {"op": str, "shape": list[int], "us": float, "flops": float, "bytes": float}
OF_A_CARD = {"card": str | None, "memory_bytes": float | None}


def read_rows(path: Path) -> list[Row]:
    """The rows of a file: measured ops, and the card.

    Raises:
        ConfigError: for a file that cannot be read, and for a line that is neither.
    """
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ConfigError("rows", str(path), f"cannot be read ({error})", LEGAL, {}) from error
    for row in rows:
        if not _is_row(row):
            raise ConfigError("rows", str(path), f"not a measured op or a card: {json.dumps(row)}", LEGAL, {})
    return rows


def _is_row(row: object) -> bool:
    """Whether it is a measured op, of a collective with its ranks; or a line that measures none, which may be that of a card."""
    if not isinstance(row, dict):
        return False
    try:
        for key, kind in (MEASURED if "us" in row else OF_A_CARD).items():
            check_value(key, row.get(key), kind)
    except ConfigError:
        return False
    return "us" not in row or len(row["shape"]) == 2 or not row["op"].endswith((IN_A_HOST, ACROSS_HOSTS))


def cluster_from_rows(rows: Iterable[Row], base: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A cluster file's content: the base's, with what these rows measure on the card.

    Raises:
        ConfigError: if they measure nothing on it.
    """
    rows = list(rows)
    timed = [row for row in rows if "us" in row and row["us"] > 0]
    card = next((row for row in rows if row.get("card")), {})
    per_host = next((row["shape"][1] for row in timed if row["op"].endswith(IN_A_HOST)), None)
    hosts = {"devices_per_host": per_host, "devices_per_node": None} if per_host else {}
    # A tray's links are those of its rack, on which the other trays are too.
    if per_host and base["devices_per_host"] > per_host == base.get("devices_per_node"):
        hosts, timed = {}, [row for row in timed if not row["op"].endswith(ACROSS_HOSTS)]
    found = _rates(timed, base) | _bandwidths(timed, base) | _links(timed, base)
    if not found:
        why = "it measures neither matmuls, attention, memory, launches nor collectives"
        raise ConfigError("rows", len(rows), why, LEGAL, {})
    if memory := card.get("memory_bytes"):
        found["memory_gb"] = memory / 1e9
    version = next((row["torch"] for row in rows if "torch" in row), "unknown")
    where = f"{card.get('card', 'a GPU')}, torch {version}"
    numbers = {key: dict(number) for key, number in base["numbers"].items()}
    numbers |= {key: measured_number(value, where) for key, value in found.items()}
    device = card.get("card", base["device"])
    return {**base, "name": name, "device": device, **hosts, "checked": [], "numbers": numbers}


def measured_number(value: object, where: str) -> dict[str, Any]:
    """A number of a cluster file."""
    return {"value": value, "kind": "measured", "source": f"{CALIBRATED} {where}"}


def _rates(timed: list[Row], base: Mapping[str, Any]) -> dict[str, Any]:
    """Rates of matmuls, under load if there is such a row; attention's table keeps the base's shape over lengths."""
    found: dict[str, Any] = {}
    peak = base["numbers"]["peak_tflops_bfloat16"]["value"] * 1e12
    matmuls = [row for row in timed if row["op"].startswith("matmul") and row["op"] != "matmul sustained"]
    sustained = [row for row in timed if row["op"] == "matmul sustained"]
    if rates := [row["flops"] / row["us"] * 1e6 for row in sustained or matmuls]:
        found["gemm_efficiency"] = median(rates) / peak * (IN_A_STEP if sustained else 1.0)
    for way, rates_at in _attention(timed).items():
        table = base["numbers"][f"attention_tflops_{way}"]["value"]
        stated = dict(zip(LENGTHS[-len(table) :], table, strict=True))
        if factors := [rate / 1e12 / stated[length] for length, rate in rates_at if length in stated]:
            found[f"attention_tflops_{way}"] = [median(factors) * rate for rate in table]
    return found


def _attention(timed: list[Row]) -> dict[str, list[tuple[int, float]]]:
    """(length, FLOP/s) of the fastest kernel of each shape, forward and backward."""
    # By shape, seconds and FLOPs: of forward alone, and with backward.
    forward: dict[tuple[int, ...], tuple[float, float]] = {}
    both: dict[tuple[int, ...], tuple[float, float]] = {}
    for row in timed:
        if row["op"].startswith("attention") and len(row["shape"]) > 3 and row["shape"][3] in LENGTHS:
            fastest, shape = both if "backward" in row["op"] else forward, tuple(row["shape"])
            fastest[shape] = min(fastest.get(shape, (math.inf, 0.0)), (row["us"] / 1e6, row["flops"]))
    pairs = [(shape[3], *forward[shape], *both[shape]) for shape in forward if shape in both]
    return {
        "forward": [(shape[3], flops / seconds) for shape, (seconds, flops) in forward.items()],
        "backward": [
            (length, (both_flops - flops) / (both_s - seconds))
            for length, seconds, flops, both_s, both_flops in pairs
            if both_s > seconds
        ],
    }


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
    if adamw := [
        rate / (ADAMW_BFLOAT16 if op.endswith("bfloat16") else 1.0)
        for op, rate in moved.items()
        if op.startswith("adamw")
    ]:
        found["optimizer_efficiency"] = median(adamw) / whole
    if launches := [row["us"] / 100 for row in timed if row["op"] == "100 launches"]:
        found["launch_us"] = launches[0]
    return found


def _links(timed: list[Row], base: Mapping[str, Any]) -> dict[str, float]:
    """Latencies and bandwidths of rings, by `simulate.network`'s model of them.

    The whole tensor's bytes take moved / bandwidth + collective_us + steps of the ring; a small tensor only the last two, with
    the steps of NCCL's fastest protocol. What collectives of a host take beside the bandwidth is divided between
    collective_us and intra_step_us as in the base.
    """
    stated = {key: number["value"] for key, number in base["numbers"].items()}
    found: dict[str, float] = {}
    fixed, step = stated["collective_us"], stated["intra_step_us"]
    if small := _steps(timed, IN_A_HOST, is_large=False):
        ratio = median(us / (fixed + n * step * PROTOCOLS[-1].step) for us, n, _ in small)
        fixed, step = fixed * ratio, step * ratio
        found |= {"collective_us": fixed, "intra_step_us": step}
    if large := _steps(timed, IN_A_HOST, is_large=True):
        found["intra_gb_s"] = _bandwidth_gb_s(large, fixed, step)
    step = stated["inter_step_us"]
    if small := _steps(timed, ACROSS_HOSTS, is_large=False):
        latencies = (max(0.0, us - fixed) / n for us, n, _ in small)
        found["inter_step_us"] = step = median(latencies) / PROTOCOLS[-1].step
    if large := _steps(timed, ACROSS_HOSTS, is_large=True):
        found |= {"inter_gb_s": _bandwidth_gb_s(large, fixed, step), "inter_efficiency": 1.0}
    return found


def _steps(timed: list[Row], where: str, is_large: bool) -> list[tuple[float, int, float]]:
    """(us, steps of the ring, bytes moved) of the collectives of the largest or smallest tensor; an all-reduce of a small tensor
    is left out, since it may take a tree."""
    rows = [row for row in timed if row["op"].endswith(where) and row["shape"][1:] != [1]]
    if not rows:
        return []
    size = (max if is_large else min)(row["shape"][0] for row in rows)
    found = []
    for row in rows:
        passes = 2 if row["op"].startswith("all_reduce") else 1
        if row["shape"][0] == size and (is_large or passes == 1):
            found.append((row["us"], passes * (row["shape"][1] - 1), row["bytes"]))
    return found


def _bandwidth_gb_s(large: list[tuple[float, int, float]], fixed_us: float, step_us: float) -> float:
    return median(moved / max(us - fixed_us - steps * step_us, us / 2) for us, steps, moved in large) / 1e3
