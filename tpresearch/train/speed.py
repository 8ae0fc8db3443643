"""How fast a run is, beside what the model costs and what the device could do."""

from __future__ import annotations

import resource
import sys

import torch
from torch import nn

from tpresearch.config.schema import Dtype
from tpresearch.train.device import Device

_TERA = 1e12
PEAK_FLOPS: dict[str, dict[Dtype, float]] = {
    # Dense matmul peaks by the makers' data sheets, without sparsity; float32 without TF32.
    "B200": {Dtype.bfloat16: 2250 * _TERA, Dtype.float32: 80 * _TERA, Dtype.float64: 40 * _TERA},
    "H200 NVL": {Dtype.bfloat16: 835 * _TERA, Dtype.float32: 60 * _TERA, Dtype.float64: 60 * _TERA},
    "H200": {Dtype.bfloat16: 989 * _TERA, Dtype.float32: 67 * _TERA, Dtype.float64: 67 * _TERA},
    "H100 PCIe": {Dtype.bfloat16: 756 * _TERA, Dtype.float32: 51 * _TERA, Dtype.float64: 51 * _TERA},
    "H100 NVL": {Dtype.bfloat16: 835 * _TERA, Dtype.float32: 60 * _TERA, Dtype.float64: 60 * _TERA},
    "H100": {Dtype.bfloat16: 989 * _TERA, Dtype.float32: 67 * _TERA, Dtype.float64: 67 * _TERA},
    "A100": {Dtype.bfloat16: 312 * _TERA, Dtype.float32: 19.5 * _TERA, Dtype.float64: 19.5 * _TERA},
    "L40S": {Dtype.bfloat16: 362 * _TERA, Dtype.float32: 91.6 * _TERA},
    "L4": {Dtype.bfloat16: 121 * _TERA, Dtype.float32: 30.3 * _TERA},
    "A10G": {Dtype.bfloat16: 70 * _TERA, Dtype.float32: 35 * _TERA},
    "RTX 4090": {Dtype.bfloat16: 165 * _TERA, Dtype.float32: 82.6 * _TERA},
    "RTX 3090": {Dtype.bfloat16: 71 * _TERA, Dtype.float32: 35.6 * _TERA},
    "MI300X": {Dtype.bfloat16: 1307 * _TERA, Dtype.float32: 163.4 * _TERA, Dtype.float64: 163.4 * _TERA},
}


def peak_flops(device_name: str, dtype: Dtype) -> float | None:
    """FLOP/s of one device at best, or None where it is not known: MFU is then undefined, not 0."""
    words = set(device_name.replace("-", " ").split())
    if words & {"MIG", "Laptop", "Ti"}:  # parts and relatives of a device that is in the table
        return None
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):
        if set(name.split()) <= words:
            return PEAK_FLOPS[name].get(dtype)
    return None


def flops_per_token(model: nn.Module, seq_len: int, causal: bool) -> float:
    """Forward and backward FLOPs of one token: 6N + 12 L h s, or 6N + 6 L h s when counted causal.

    N counts parameters without embeddings, which look up instead of multiplying (arXiv 2204.02311, app. B).
    A model that has no `attention_flops_per_token` is counted as 6N.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    attention = getattr(model, "attention_flops_per_token", None)
    quadratic = attention(seq_len) if callable(attention) else 0.0
    return 6.0 * weights + (quadratic / 2 if causal else quadratic)


def peak_memory_bytes(device: Device) -> int:
    """The most memory this rank has held: of the CUDA allocator, or the process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device.torch)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes if sys.platform == "darwin" else kilobytes * 1024
