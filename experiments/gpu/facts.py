"""Card, driver and torch versions, and which attention kernel a model of each dtype gets."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys

import torch
from gpu.rows import Stage

from tpresearch.parallel.device import attention_backend

QUERY = "name,memory.total,driver_version,power.limit,clocks.max.sm,pci.bus_id"


def main() -> None:
    stage, _ = Stage.from_arguments("facts")
    stage.add(
        python=sys.version.split()[0],
        torch=torch.__version__,
        cuda=torch.version.cuda,
        cores=len(os.sched_getaffinity(0)),
        machine=platform.machine(),
        free_disk_bytes=shutil.disk_usage(stage.out).free,
    )
    if stage.on_cuda:
        command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        said = (
            subprocess.run(command, capture_output=True, text=True).stdout if shutil.which(command[0]) else ""
        )
        stage.add(
            card=torch.cuda.get_device_name(),
            nvidia_smi=said.strip(),
            capability=list(torch.cuda.get_device_capability()),
            cudnn=torch.backends.cudnn.version(),
            nccl=list(torch.cuda.nccl.version()),
            memory_bytes=torch.cuda.get_device_properties(0).total_memory,
            allocator=os.environ.get("PYTORCH_ALLOC_CONF"),
        )
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        for kv_heads in (8, 2):
            found = attention_backend(stage.device, dtype, heads=8, kv_heads=kv_heads, head_dim=128)
            stage.add(op="attention backend", dtype=str(dtype), heads=8, kv_heads=kv_heads, backend=found)


if __name__ == "__main__":
    main()
