"""Speed of a run: tokens per second and MFU."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from tpresearch.config.schema import Config, Dtype
from tpresearch.config.validate import tokens_per_step
from tpresearch.parallel.device import Device

_TERA = 1e12
PEAK_FLOPS: dict[str, dict[Dtype, float]] = {
    # Dense matmul peaks by the makers' data sheets, without sparsity; float32 without TF32.
    "GB300": {Dtype.bfloat16: 2500 * _TERA, Dtype.float32: 80 * _TERA, Dtype.float64: 1.3 * _TERA},
    "GB200": {Dtype.bfloat16: 2500 * _TERA, Dtype.float32: 80 * _TERA, Dtype.float64: 40 * _TERA},
    "B200": {Dtype.bfloat16: 2250 * _TERA, Dtype.float32: 80 * _TERA, Dtype.float64: 40 * _TERA},
    "H200 NVL": {Dtype.bfloat16: 835 * _TERA, Dtype.float32: 60 * _TERA, Dtype.float64: 60 * _TERA},
    "H200": {Dtype.bfloat16: 989 * _TERA, Dtype.float32: 67 * _TERA, Dtype.float64: 67 * _TERA},
    "H100 PCIe": {Dtype.bfloat16: 756 * _TERA, Dtype.float32: 51 * _TERA, Dtype.float64: 51 * _TERA},
    "H100 NVL": {Dtype.bfloat16: 835 * _TERA, Dtype.float32: 60 * _TERA, Dtype.float64: 60 * _TERA},
    "H100": {Dtype.bfloat16: 989 * _TERA, Dtype.float32: 67 * _TERA, Dtype.float64: 67 * _TERA},
    "H800 PCIe": {Dtype.bfloat16: 756 * _TERA, Dtype.float32: 51 * _TERA, Dtype.float64: 0.8 * _TERA},
    "H800": {Dtype.bfloat16: 989 * _TERA, Dtype.float32: 67 * _TERA, Dtype.float64: 1 * _TERA},
    "A800": {Dtype.bfloat16: 312 * _TERA, Dtype.float32: 19.5 * _TERA, Dtype.float64: 19.5 * _TERA},
    "A100": {Dtype.bfloat16: 312 * _TERA, Dtype.float32: 19.5 * _TERA, Dtype.float64: 19.5 * _TERA},
    "L40S": {Dtype.bfloat16: 362 * _TERA, Dtype.float32: 91.6 * _TERA, Dtype.float64: 1.4 * _TERA},
    "L4": {Dtype.bfloat16: 121 * _TERA, Dtype.float32: 30.3 * _TERA},
    "A10G": {Dtype.bfloat16: 70 * _TERA, Dtype.float32: 35 * _TERA},
    "RTX 4090": {Dtype.bfloat16: 165 * _TERA, Dtype.float32: 82.6 * _TERA},
    "RTX 3090": {Dtype.bfloat16: 71 * _TERA, Dtype.float32: 35.6 * _TERA},
    "MI300X": {Dtype.bfloat16: 1307 * _TERA, Dtype.float32: 163.4 * _TERA, Dtype.float64: 163.4 * _TERA},
}


@dataclass(frozen=True)
class Speed:
    """Tokens and model FLOPs of a step, and the device's peak."""

    tokens_per_step: int
    world_size: int
    flops_per_token: float
    """With full attention counted."""
    causal_flops_per_token: float
    peak_flops: float | None
    """Of one device; None if it is not known."""

    @classmethod
    def of(cls, model: nn.Module, cfg: Config, device: Device, world_size: int) -> Speed:
        """The speed of this config.

        Args:
            model: plain, before it is sharded.
        """
        whole, causal = (flops_per_token(model, cfg.data.seq_len, causal) for causal in (False, True))
        peak = peak_flops(device.name, cfg.train.dtype)
        return cls(tokens_per_step(cfg), world_size, whole, causal, peak)

    def metrics(self, step_time_s: float) -> dict[str, float | int | None]:
        """The perf/* of a row whose steps took this long each."""
        speed = self.tokens_per_step / step_time_s
        per_device, peak = speed / self.world_size, self.peak_flops
        return {
            "perf/step_time_s": step_time_s,
            "perf/tokens_per_second": speed,
            "perf/tokens_per_second_per_device": per_device,
            "perf/mfu": per_device * self.flops_per_token / peak if peak else None,
            "perf/mfu_causal": per_device * self.causal_flops_per_token / peak if peak else None,
        }


def peak_flops(device_name: str, dtype: Dtype) -> float | None:
    """Peak FLOP/s of one device, or None if unknown: MFU is then undefined, not 0."""
    words = set(device_name.replace("-", " ").split())
    if words & {"MIG", "Laptop", "Ti", "D"}:  # parts and relatives of a device that is in the table
        return None
    for name in sorted(PEAK_FLOPS, key=len, reverse=True):
        if set(name.split()) <= words:
            return PEAK_FLOPS[name].get(dtype)
    return None


def flops_per_token(model: nn.Module, seq_len: int, causal: bool) -> float:
    """Forward and backward FLOPs of one token: 6N + 12 L h s, or 6N + 6 L h s when counted causal.

    N counts parameters without embeddings, which look up instead of multiplying (arXiv 2204.02311, app. B); one that
    is tied to an output layer multiplies there.
    A model that has no `attention_flops_per_token` is counted as 6N.
    """
    multiplied = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} - multiplied
    weights = sum(p.numel() for p in model.parameters() if id(p) not in embeddings)
    attention = getattr(model, "attention_flops_per_token", None)
    quadratic = attention(seq_len) if callable(attention) else 0.0
    return 6.0 * weights + (quadratic / 2 if causal else quadratic)
