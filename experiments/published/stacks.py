"""Adjustments of a cluster's numbers for a row's software and cards: few constants, none per row.

conf/cluster describes today's software. A row of 2023 ran other matmul and attention kernels: rates belong to a GPU and
its software, not to the GPU's name.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from published.row import Row

from tpresearch.config.errors import ConfigError
from tpresearch.launch.composition import read_option

FLASH_2 = {
    "A100": ([120, 150, 170, 185, 190, 193], [90, 115, 135, 150, 160, 165]),
    "H100": ([191, 260, 298, 319, 333, 335], [150, 200, 240, 270, 290, 300]),
}
"""FlashAttention-2, causal, head width 128 (arXiv 2307.08691, figures 5 and 7; arXiv 2407.08608, figure 5; read off)."""
FLASH_1 = 0.57
"""Of FlashAttention-2's rate: the kernel of llm-foundry's benchmarks, on A100 and H100 alike (fitted)."""
HOPPER_2024 = 0.62
"""Share of its peak that a large matmul reached on an H100 of 700 W until 2024 (fitted on llm-foundry's rows of 2023)."""
ELSEWHERE = 0.97
"""Of these matmul rates at sites on which no rate was fitted. (Fitted on 17 of these sites, each counted once: without it their median
error is -4 % of a step, with it -2 %.)"""
FITTED = ("composer", "fms-fsdp", "kempnerforge", "torchtitan")
OLDER = ("composer", "fms-fsdp", "torchtitan")
NEWER = ("nemo", "megatron", "pax", "maxtext")
"""Software with its own or NVIDIA's newest matmuls; what is neither is older by its year, or between the two where none is
stated."""
AT_500_W = 0.87
"""Of the rates at 700 W: between the cube root and the root of the power, as clocks go."""
AT_700_W = ("h100_dgx", "h200_dgx", "h800_dgx")
UNKNOWN = {**dict.fromkeys(AT_700_W, 0.67), "h100_500w": 0.67 * AT_500_W}
"""Matmul rates of a Hopper card of which nothing else is known, for `left_out`."""
IBM_A100 = 0.83
"""The same of fms-fsdp's A100 (fitted on its four rows; the same site's H100 are no faster than others)."""
KEMPNER = 0.74
"""The same of KempnerForge's cards, by its single H200 (Llama3-8B, 10,471 tokens/s)."""
FOUR_CARDS_GB_S = {"A100": 120.0, "H100": 180.0, "H200": 180.0}
"""Bus bandwidth of four cards on a board without a switch. (H200: KempnerForge's profile of its 13B on 24 GPUs, gathers of 63 MB
in 350 us, scatters in 394 us; A100: its links are two thirds of that.)"""
KEMPNER_BETWEEN_GB_S = 25.0
"""Per GPU between KempnerForge's hosts, by the same profile (benchmarks/profiling/13b_24gpu_profiling.md): its FSDP reduces
272 MB in 14.4 ms."""
LLM_FOUNDRY_SCALE = 0.01
"""`scale_slowdown` of llm-foundry's clusters (fitted on their rows on 16 to 512 GPUs, together with `overlap_slowdown`)."""
CLOUDS = {
    r"\bp4de?\b": 50.0,
    r"\bp5e?n?\b": 400.0,
    r"\ba2-(high|mega|ultra)": 12.5,
    r"\ba3-?high": 100.0,
    r"\ba3-?mega": 200.0,
    r"\ba3-?ultra": 400.0,
    r"\bnd\w*a100|\bselene\b": 200.0,
    r"\bnd\w*h[12]00": 400.0,
}
"""Gbit/s per GPU between hosts of a cloud's machine type or of a named computer, for rows that do not state it."""
OPTIONS = {
    "A100": "a100_80",
    "A800": "a800_80",
    "H100": "h100_dgx",
    "H200": "h200_dgx",
    "H800": "h800_dgx",
    "B200": "b200",
    "GB200": "gb200_nvl72",
    "GB300": "gb300_nvl72",
    "L40S": "l40s",
}
SAME_CHIP = {"A800": "A100", "H800": "H100"}
"""Cards with another's chip, and fewer links."""


def cluster_of_row(row: Row, sites: bool = True) -> dict[str, Any]:
    """The cluster's YAML with what the row states of its network, and its software's rates.

    Args:
        sites: whether matmul rates of its software's year and site are known, or only the card is.

    Raises:
        ConfigError: for cards that no cluster file describes.
    """
    plain = _read(cluster_name(row))
    numbers = {name: dict(number) for name, number in plain["numbers"].items()}
    changed: dict[str, Any] = {}
    gpu, engine = SAME_CHIP.get(row.gpu, row.gpu), row.engine
    if row["attn"] not in ("cudnn", "fa3") and gpu in ("A100", "H100", "H200"):
        is_first = engine == "composer" or row["attn"] == "fa1"
        slower = FLASH_1 if is_first else AT_500_W if plain["name"] == "h100_500w" else 1.0
        forward, backward = (
            [rate * slower for rate in table] for table in FLASH_2[gpu.replace("H200", "H100")]
        )
        changed |= {"attention_tflops_forward": forward, "attention_tflops_backward": backward}
    rate = UNKNOWN.get(plain["name"])
    if sites:
        rate = _matmul_rate(row, plain["name"]) or float(numbers["gemm_efficiency"]["value"])
        rate *= 1.0 if _is_fitted(row, plain["name"]) else ELSEWHERE
    if rate:
        changed["gemm_efficiency"] = rate
    is_rack = plain["devices_per_host"] > 8
    per_host = plain["devices_per_host"] if is_rack else row.count("gpus_per_node", 8)
    if between := row.number("internode_gbps_per_gpu") or _of_the_cloud(row):
        changed["inter_gb_s"] = between / 8
    joined = per_host != 4
    if not joined and row.gpu in FOUR_CARDS_GB_S:
        changed["intra_gb_s"] = FOUR_CARDS_GB_S[row.gpu]
    if engine == "kempnerforge" and sites:
        changed |= {"inter_gb_s": KEMPNER_BETWEEN_GB_S, "inter_efficiency": 1.0}
    if engine == "composer" and sites:
        changed["scale_slowdown"] = LLM_FOUNDRY_SCALE
    for name, value in changed.items():
        numbers[name] = {"value": value, "kind": "fitted", "source": "experiments/published/stacks.py"}
    return {**plain, "numbers": numbers, "devices_per_host": per_host, "has_switch": joined}


def _is_fitted(row: Row, cluster: str) -> bool:
    """Whether the rate was fitted where the row was measured: torchtitan's own cards are A100 and H100 of 500 W. (Of B200 and
    cards that were never checked, the rates are guesses anyway.)"""
    if SAME_CHIP.get(row.gpu, row.gpu) not in ("A100", "H100", "H200") or cluster == "h100_pcie":
        return True
    return row.engine in FITTED and (row.engine != "torchtitan" or cluster not in AT_700_W)


def _of_the_cloud(row: Row) -> float | None:
    words = f"{row['gpu_note']} {row['notes']} {row['source_file']}".lower()
    return next((rate for name, rate in CLOUDS.items() if re.search(name, words)), None)


def _matmul_rate(row: Row, cluster: str) -> float | None:
    """By year and site; None for today's, as conf/cluster has it."""
    if row.engine == "kempnerforge":
        return KEMPNER
    if row.engine == "fms-fsdp" and row.gpu == "A100":
        return IBM_A100
    if cluster not in ("h100_dgx", "h800_dgx"):
        return None
    if row.engine in OLDER:
        return HOPPER_2024
    if row.engine in NEWER:
        return None
    if row.year is None:
        return (HOPPER_2024 + UNKNOWN[cluster]) / 2
    return HOPPER_2024 if row.year <= 2024 else None


def cluster_name(row: Row) -> str:
    """The option of conf/cluster for a row's cards."""
    gpu, note = row.gpu, f"{row['gpu_note']} {row['gpu']}".lower()
    named = re.search(r"(\d+) ?gi?b", note)
    memory = row.number("gpu_mem_gb", float(named[1]) if named else 0)
    if gpu not in OPTIONS:
        raise ConfigError(
            "gpu", row["gpu"] or None, "no cluster file describes it", "one of " + " ".join(OPTIONS), {}
        )
    if (gpu == "H100" and "nvl" in re.findall("[a-z]+", note)) or (gpu != "H100" and "pcie" in note):
        why = "no cluster file describes this kind of card, with its lower power"
        raise ConfigError("gpu", f"{row['gpu']} {row['gpu_note']}".strip(), why, "SXM, or H100 PCIe", {})
    if gpu == "A100" and 0 < memory <= 40:
        return "a100_40"
    if gpu == "H100" and "pcie" in note:
        return "h100_pcie"
    if gpu == "H100" and ("500" in note or "hbm2e" in note or memory > 90):
        return "h100_500w"
    return OPTIONS[gpu]


@cache
def _read(name: str) -> dict[str, Any]:
    return read_option("cluster", name)
