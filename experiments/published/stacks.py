"""What a row's software and cards do to a cluster's numbers: few constants, none by row.

conf/cluster describes today's software. A row of 2023 ran other matmul and attention kernels: rates belong to a GPU and
its software, not to the GPU's name.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml
from rows import Row

ROOT = Path(__file__).parents[2]
FLASH_2 = {
    "A100": ([120, 150, 170, 185, 190, 193], [90, 115, 135, 150, 160, 165]),
    "H100": ([191, 260, 298, 319, 333, 335], [150, 200, 240, 270, 290, 300]),
}
"""FlashAttention-2, causal, head width 128 (arXiv 2307.08691, figures 5 and 7; arXiv 2407.08608, figure 5; read off)."""
FLASH_1 = 0.573
"""Of FlashAttention-2's rate: the kernel of llm-foundry's benchmarks, on A100 and H100 alike (fitted)."""
HOPPER_2023 = 0.606
"""Share of its peak that a large matmul of 2023 reached on an H100 of 700 W (fitted on llm-foundry's rows)."""
HOPPER_2024 = 0.66
"""The same of 2024: between the one before and today's 0.78 (guessed)."""
DTENSOR_2025_US = 2300.0
"""Host time per collective of a sharding rule on KempnerForge's torch (fitted on its three rows with tp=4)."""


def cluster_of_row(row: Row) -> dict[str, Any]:
    """The cluster's YAML with what the row states of its network, and its software's rates."""
    plain = _read(cluster_name(row))
    numbers = {name: dict(number) for name, number in plain["numbers"].items()}
    changed: dict[str, Any] = {}
    family = "A100" if row["gpu"] == "A100" else "H100"
    if row["attn"] != "cudnn" and row["gpu"] in ("A100", "H100", "H200"):
        slower = FLASH_1 if row["engine"].startswith("composer") else 1.0
        forward, backward = ([rate * slower for rate in table] for table in FLASH_2[family])
        changed |= {"attention_tflops_forward": forward, "attention_tflops_backward": backward}
    if plain["name"] == "h100_dgx":
        by_engine = {"composer": HOPPER_2023, "fms-fsdp": HOPPER_2024, "torchtitan": HOPPER_2024}
        if rate := by_engine.get(row["engine"].partition("/")[0]):
            changed["gemm_efficiency"] = rate
    if row["engine"].startswith("kempnerforge"):
        changed["tensor_host_us"] = DTENSOR_2025_US
    if row["internode_gbps_per_gpu"]:
        changed["inter_gb_s"] = row.number("internode_gbps_per_gpu") / 8
    for name, value in changed.items():
        numbers[name] = {"value": value, "kind": "fitted", "source": "experiments/published/stacks.py"}
    return {**plain, "numbers": numbers, "devices_per_host": int(row.number("gpus_per_node", 8))}


def cluster_name(row: Row) -> str:
    """The option of conf/cluster for a row's cards."""
    gpu, note = row["gpu"].upper(), row["gpu_note"].lower()
    if gpu == "A100":
        return "a100_40" if row.number("gpu_mem_gb", 80) <= 40 else "a100_80"
    if gpu == "H100":
        return (
            "h100_500w" if "500" in note or "hbm2e" in note or row.number("gpu_mem_gb") > 90 else "h100_dgx"
        )
    return {"H200": "h200_dgx", "B200": "b200", "L40S": "l40s"}.get(gpu, "h100_dgx")


@cache
def _read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "conf" / "cluster" / f"{name}.yaml").read_text())
    return found
