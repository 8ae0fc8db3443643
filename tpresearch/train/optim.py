"""The optimizer, and the learning-rate schedule."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tpresearch.config.choices import OptimizerName, ScheduleName
from tpresearch.config.errors import ConfigError
from tpresearch.config.training import OptimizerConfig, ScheduleConfig
from tpresearch.train.adamw import AdamW, ElementwiseAdamW
from tpresearch.train.state import MasterWeights


def divide_gradients(optimizer: torch.optim.Optimizer, gradients: list[Tensor], divisor: Tensor) -> None:
    """Divide all gradients by a scalar: in the update itself where that can, without a pass over them, or in place."""
    if isinstance(optimizer, AdamW) and divisor.dtype is torch.float32:
        # Where parameters are offloaded, torch would begin to copy it to the CPU and read it there without waiting.
        optimizer.grad_scale = divisor.to(gradients[0].device)
        return
    by_dtype: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault((gradient.device, gradient.dtype), []).append(gradient)
    for (device, dtype), alike in by_dtype.items():
        if dtype is divisor.dtype:
            torch._foreach_mul_(alike, 1 / divisor.to(device))
        else:  # a factor in bfloat16 would have three digits
            torch._foreach_copy_(
                alike, [gradient.to(divisor.dtype) / divisor.to(device) for gradient in alike]
            )


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig, masters: MasterWeights | None = None
) -> torch.optim.Optimizer:
    """AdamW or SGD over sharded parameters; weight decay on matrices, and on vectors if configured.

    One group for each mesh that parameters live on, since torch's fused and foreach updates take no mixture.

    Args:
        masters: which the parameters are; `ElementwiseAdamW` updates the model's copies of them too.
    """
    groups: dict[tuple[object, bool], list[nn.Parameter]] = {}
    for parameter in parameters:
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((mesh, parameter.dim() >= 2 or config.decay_vectors), []).append(parameter)
    param_groups = [
        {"params": alike, "weight_decay": config.weight_decay if decays else 0.0}
        for (_, decays), alike in groups.items()
    ]
    if config.name is OptimizerName.sgd:
        # DTensor has no fused SGD (torch 2.13).
        return torch.optim.SGD(param_groups, lr=config.lr, momentum=config.momentum)
    settings: dict[str, Any] = {"lr": config.lr, "betas": tuple(config.betas), "eps": config.eps}
    copies, remainders = (masters.copies, masters.remainders) if masters else ({}, {})
    if config.moment_dtype is None and not config.compile and not remainders:
        return AdamW(param_groups, fused=True, **settings)
    moments: torch.dtype | None = getattr(torch, config.moment_dtype) if config.moment_dtype else None
    return ElementwiseAdamW(param_groups, moments, config.compile, copies, remainders, **settings)


def learning_rate(step: int, total: int, peak: float, schedule: ScheduleConfig) -> float:
    """The learning rate of step `step`, counted from 0, of `total`; later ones, which a job in Python may take, have the last's.

    Linear warmup to `peak`, then: constant; half a cosine to min_lr_ratio (SGDR, arXiv 1608.03983);
    or level until the last decay_ratio of all steps, or of those that warmup leaves, and then linear to min_lr_ratio
    (arXiv 2405.18392).
    """
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    floor = schedule.min_lr_ratio
    if schedule.name is ScheduleName.cosine:
        done = (step - schedule.warmup_steps) / max(total - schedule.warmup_steps, 1)
        return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0))))
    if schedule.name is ScheduleName.wsd:
        decay = max(min(round(total * schedule.decay_ratio), total - schedule.warmup_steps), 1)
        left = (total - step) / decay
        return peak * (floor + (1 - floor) * min(max(left, 0.0), 1.0))
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


OF_SHARDS = "DTensor|[Ss]harding|placement|meshes"
"""Of torch's errors where an op has no form for sharded tensors, or for a mixture of them."""


@contextmanager
def refusing_shards(optimizer: torch.optim.Optimizer, plan: str) -> Iterator[None]:
    """Context of a step of an optimizer of the user's own, which may use ops that torch does not have for sharded weights.

    Args:
        plan: the option of `parallel`.
    """
    try:
        yield
    except RuntimeError as error:
        if not re.search(OF_SHARDS, str(error)):
            raise
        why = f"torch cannot take its step on the sharded weights of parallel={plan}"
        legal = (
            "one without foreach and fused that is elementwise, such as torch.optim.RMSprop, or parallel=ddp"
        )
        raise ConfigError("optimizer", type(optimizer).__name__, why, legal, fix={}) from error
