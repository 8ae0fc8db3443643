"""What a step computes: optimizer, schedule and training, as the keys of a config (see `schema.py`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from tpresearch.config.choices import (
    Dtype,
    Float8,
    Loss,
    OnNonfinite,
    OptimizerName,
    ScheduleName,
    WeightDtype,
)
from tpresearch.config.values import POSITIVE, SHARE, AtLeast, Within

ROWS = AtLeast(1, 10**7)


@dataclass
class OptimizerConfig:
    """AdamW has betas and eps; SGD has momentum."""

    name: OptimizerName = OptimizerName.adamw
    lr: Annotated[float, POSITIVE] = 3e-3
    """Greatest learning rate, which the schedule scales."""
    betas: Annotated[list[float], Within(0, 1, open_above=True)] = field(default_factory=lambda: [0.9, 0.95])
    eps: Annotated[float, POSITIVE] = 1e-8
    weight_decay: Annotated[float, AtLeast(0)] = 0.1
    """Of matrices: the share of a weight, times the learning rate, that each step takes off (AdamW), or adds to its gradient (SGD)."""
    decay_vectors: bool = False
    """Let weight decay reach biases and norm weights too, as torch's AdamW does unless it is told otherwise."""
    momentum: Annotated[float, SHARE] = 0.0


@dataclass
class ScheduleConfig:
    name: ScheduleName = ScheduleName.cosine
    warmup_steps: Annotated[int, AtLeast(0)] = 10
    """Steps over which the learning rate rises linearly from 0."""
    min_lr_ratio: Annotated[float, SHARE] = 0.1
    """Learning rate at the end, as a fraction of optimizer.lr."""
    decay_ratio: Annotated[float, SHARE] = 0.2
    """Share of all steps over which wsd decays, at the end."""


@dataclass
class TrainConfig:
    steps: Annotated[int | None, AtLeast(1)] = 100
    """Optimizer steps; null where train.tokens is the budget."""
    tokens: Annotated[int | None, AtLeast(1)] = None
    """Tokens to train on, rounded up to whole steps; null where train.steps is the budget."""
    global_batch_size: Annotated[int, ROWS] = 24
    """Rows per optimizer step, over all ranks and accumulation: part of the science, not of the plan."""
    micro_batch_size: Annotated[int | None, ROWS] = None
    """Rows a data-parallel rank takes through the model at once; null for all of its share."""
    loss: Loss = Loss.next_token
    """next_token: mean cross-entropy. sum: the sum of all outputs, without targets or least value, logged as train/loss."""
    loss_chunk: Annotated[int | None, AtLeast(1)] = 2048
    """Tokens whose logits a rank holds at once; null for those of a whole micro-batch, as where the output layer has a
    bias, and where parallel.loss_parallel=false gathers them."""
    seed: Annotated[int, AtLeast(0)] = 0
    """Of first weights, the order of rows, and what models draw."""
    dtype: Dtype = Dtype.float32
    """Dtype of the computation. bfloat16 keeps float32 weights, gradients and optimizer state, unless weights says."""
    weights: WeightDtype = WeightDtype.float32
    """Of weights, gradients and optimizer state where dtype is bfloat16: bfloat16 halves them, and rounds each update."""
    float8: Float8 = Float8.none
    """Multiply in float8 in the blocks' linear layers, where dtype is bfloat16: scaled by tensor (faster) or by row (closer)."""
    float8_emulated: bool = False
    """Round as float8 does, and multiply in float32: slow, on any device, to see what it does to a loss."""
    clip_grad_norm: Annotated[float | None, POSITIVE] = 1.0
    """Greatest global gradient norm; null never clips."""
    log_every: Annotated[int, AtLeast(1)] = 1
    """Steps between logged rows: but for evaluation, the only times at which the host waits for a CUDA device."""
    eval_every: Annotated[int | None, AtLeast(1)] = 50
    """Steps between evaluations on held-out rows; null for only after the last step."""
    eval_rows: Annotated[int, AtLeast(0)] = 96
    """Held-out rows read at each evaluation."""
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """stop: at a loss or gradient norm that is not finite. skip: leave out updates whose norm is not finite."""
    warmup_log_steps: Annotated[int, AtLeast(0)] = 5
    """First steps left out of the medians of perf/* in summary.json."""

    @property
    def weight_dtype(self) -> Dtype:
        """In which weights are kept and trained."""
        return Dtype.float64 if self.dtype is Dtype.float64 else Dtype(self.weights)
