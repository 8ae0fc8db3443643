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
from tpresearch.config.values import FRACTION, POSITIVE, AtLeast, Within

ROWS_BOUND = AtLeast(1, 10**7)


@dataclass(slots=True)
class OptimizerConfig:
    """AdamW has betas and eps; SGD has momentum."""

    name: OptimizerName = OptimizerName.adamw
    lr: Annotated[float, POSITIVE] = 3e-3
    """Peak learning rate, which the schedule scales."""
    betas: Annotated[list[float], Within(0, 1, open_above=True)] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of the moments (AdamW)."""
    eps: Annotated[float, POSITIVE] = 1e-8
    """Added to the denominator of the update (AdamW)."""
    weight_decay: Annotated[float, AtLeast(0)] = 0.1
    """Of matrices: decoupled, times the learning rate (AdamW), or added to the gradient (SGD)."""
    decay_vectors: bool = False
    """Apply weight decay to biases and norm weights too, as torch's AdamW does by default."""
    momentum: Annotated[float, FRACTION] = 0.0
    """Momentum (SGD)."""
    moment_dtype: WeightDtype | None = None
    """Dtype in which moments are stored (AdamW); null for that of the weights that are updated. With float32 master weights,
    bfloat16 saves 4 bytes per parameter (DeepSeek-V3, arXiv 2412.19437, section 3.3.3). Computed in float32 in any case; a second
    moment in bfloat16 stops moving where 1 - beta2 is below 0.004."""
    compile: bool = False
    """Update through torch.compile, a kernel per tensor (AdamW): on a GPU it moves more bytes per second than torch's fused
    kernel, where tensors have millions of elements."""
    split_masters: bool = False
    """Keep float32 master weights as the model's bfloat16 copies and 16 more bits each (AdamW), exactly: 4 bytes per parameter
    instead of 6. Copies round ties away from zero. Without optimizer.compile the update takes some 30 ops per tensor."""

    @property
    def moments(self) -> int:
        """Moments that it keeps of each gradient."""
        return 2 if self.name is OptimizerName.adamw else int(self.momentum > 0)


@dataclass(slots=True)
class ScheduleConfig:
    name: ScheduleName = ScheduleName.cosine
    warmup_steps: Annotated[int, AtLeast(0)] = 10
    """Steps over which the learning rate rises linearly from 0."""
    min_lr_ratio: Annotated[float, FRACTION] = 0.1
    """Learning rate at the end, as a fraction of optimizer.lr."""
    decay_ratio: Annotated[float, FRACTION] = 0.2
    """Share of all steps, at the end, over which wsd decays; at most what warmup leaves."""


@dataclass(slots=True)
class TrainConfig:
    steps: Annotated[int | None, AtLeast(1)] = 100
    """Optimizer steps; null where train.tokens is the budget."""
    tokens: Annotated[int | None, AtLeast(1)] = None
    """Tokens to train on, rounded up to whole steps; null where train.steps is the budget."""
    global_batch_size: Annotated[int, ROWS_BOUND] = 24
    """Rows per optimizer step, over all ranks and accumulation steps: it defines the experiment, whatever the plan."""
    micro_batch_size: Annotated[int | None, ROWS_BOUND] = None
    """Rows per data-parallel rank and forward pass; null for all of the rank's rows at once."""
    loss: Loss = Loss.next_token
    """Objective: next_token (mean cross-entropy), or sum (of all outputs, without targets or minimum), logged as train/loss."""
    loss_chunk: Annotated[int | None, AtLeast(1)] = 2048
    """Tokens whose logits a rank holds at once; null for those of a whole micro-batch, as when the output layer has a
    bias, or parallel.loss_parallel=false gathers them."""
    seed: Annotated[int, AtLeast(0)] = 0
    """Seed of initial weights, row order, and random operations of models."""
    dtype: Dtype = Dtype.float32
    """Dtype of the computation. bfloat16 keeps weights, gradients and optimizer state in float32, unless train.weights is bfloat16."""
    weights: WeightDtype = WeightDtype.float32
    """Dtype of weights, gradients and optimizer state with dtype=bfloat16: bfloat16 halves their memory and rounds each update."""
    float8: Float8 = Float8.none
    """Multiply in float8 in the blocks' linear layers, with dtype=bfloat16: scaled per tensor (faster) or per row (more accurate)."""
    float8_emulated: bool = False
    """Round as float8 does, but multiply in float32: slow, on any device, to see its effect on the loss."""
    clip_grad_norm: Annotated[float | None, POSITIVE] = 1.0
    """Maximum global gradient norm; null never clips."""
    log_every: Annotated[int, AtLeast(1)] = 1
    """Steps between logged rows: apart from evaluation, the only points at which the host waits for a CUDA device."""
    eval_every: Annotated[int | None, AtLeast(1)] = 50
    """Steps between evaluations on held-out rows; null for only after the last step."""
    eval_rows: Annotated[int, AtLeast(0)] = 96
    """Held-out rows read at each evaluation."""
    on_nonfinite: OnNonfinite = OnNonfinite.stop
    """On a non-finite loss or gradient norm: stop the run, or skip updates whose norm is not finite."""
    warmup_log_steps: Annotated[int, AtLeast(0)] = 5
    """First steps excluded from the medians of perf/* in summary.json."""

    @property
    def weight_dtype(self) -> Dtype:
        """Dtype in which weights are kept and trained."""
        return Dtype.float64 if self.dtype is Dtype.float64 else Dtype(self.weights)
