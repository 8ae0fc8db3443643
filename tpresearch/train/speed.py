"""Speed of a run: tokens per second and MFU."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from tpresearch.config.schema import Config, Dtype
from tpresearch.config.validate import tokens_per_step
from tpresearch.parallel.device import Device
from tpresearch.plan.compiler import Plan
from tpresearch.plan.probe import Probe

PEAK_TFLOPS: dict[str, tuple[float, ...]] = {
    "GB300": (2500, 80, 1.3),
    "GB200": (2500, 80, 40),
    "B200": (2250, 80, 40),
    "H200 NVL": (835, 60, 60),
    "H200": (989, 67, 67),
    "H100 PCIe": (756, 51, 51),
    "H100 NVL": (835, 60, 60),
    "H100": (989, 67, 67),
    "H800 PCIe": (756, 51, 0.8),
    "H800": (989, 67, 1),
    "A800": (312, 19.5, 19.5),
    "A100": (312, 19.5, 19.5),
    "L40S": (362, 91.6, 1.4),
    "L4": (121, 30.3),
    "A10G": (70, 35),
    "RTX 4090": (165, 82.6),
    "RTX 3090": (71, 35.6),
    "MI300X": (1307, 163.4, 163.4),
}
"""Peaks of dense matmuls in bfloat16, float32 without TF32 and, where there are such units, float64: by the makers' data sheets."""
DTYPES = (Dtype.bfloat16, Dtype.float32, Dtype.float64)
NOT_PROBED = Probe()


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
    def of(cls, model: nn.Module, plan: Plan, cfg: Config, device: Device) -> Speed:
        """The speed of this config.

        Args:
            model: plain, before it is sharded.
        """
        given = model, cfg.data.seq_len
        whole, causal = (flops_per_token(*given, causal, plan.probe) for causal in (False, True))
        peak = peak_flops(device.name, cfg.train.dtype)
        return cls(tokens_per_step(cfg), plan.sizes.world, whole, causal, peak)

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
    for name in sorted(PEAK_TFLOPS, key=len, reverse=True):
        if set(name.split()) <= words:
            peaks = dict(zip(DTYPES, PEAK_TFLOPS[name], strict=False))
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


def flops_per_token(model: nn.Module, seq_len: int, causal: bool, probe: Probe = NOT_PROBED) -> float:
    """Forward and backward FLOPs of one token: 6N + 12 L h s, or 6N + 6 L h s when counted causal.

    N counts parameters without embeddings, which look up instead of multiplying (arXiv 2204.02311, app. B); one that
    is an output layer's weight too multiplies there. A weight counts as often as it multiplies: several times where its layer runs
    several times on a token, or on each patch of an image that is a row of numbers. A frozen one counts without the 2 of its own
    gradient, nor those of an input that needs none.
    A model that has no `attention_flops_per_token` is counted as 6N.

    Args:
        probe: what a forward pass over shapes has shown about it, if it is known.
    """
    calls, flops = Counter(probe.called), sum(probe.matmul_flops.values())
    names = {parameter: name for name, parameter in model.named_parameters()}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            continue
        frozen = 2 if name in probe.no_input_grad else 4
        times = max(1, calls[name])  # 1 also of what another module's forward reads
        own = (p for p in module.parameters(recurse=False) if names[p] not in probe.matmul_flops)
        flops += times * sum(p.numel() * (6 if p.requires_grad else frozen) for p in own)
    attention = getattr(model, "attention_flops_per_token", None)
    quadratic = attention(seq_len) if callable(attention) else 0.0
    return flops + (quadratic / 2 if causal else quadratic)
