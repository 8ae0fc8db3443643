"""Faults of a step: what a rank draws, reads, sums, clips and updates.

Three are the tutorial's own mistakes, which `defects.*` of any run makes too (`tpresearch/train/defects.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tpresearch.config.schema import DefectsConfig
from tpresearch.data.batches import Batch, Batches
from tpresearch.parallel import apply, weights
from tpresearch.plan.compiler import Plan
from tpresearch.train import assemble, loop, step
from tpresearch.train import defects as train_defects
from tpresearch.train.cross_entropy import VocabularyShard
from tpresearch.train.losses import ChunkedCrossEntropy, FullCrossEntropy
from tpresearch.train.step import Setup, TrainState

Patched = AbstractContextManager[Any]


def mistake(**defects: bool) -> Callable[[], Patched]:
    """One of the tutorial's mistakes, in a run whose config does not ask for it."""

    def made(cfg: Any, *rest: Any) -> Any:
        return train_defects.build_defects(replace(cfg, defects=DefectsConfig(**defects)), *rest)

    return lambda: patch.object(assemble, "build_defects", made)


# Weights and shards


weights_of_each_rank = mistake(weights_per_rank=True)


def weights_of_each_tp_rank() -> Patched:
    """Whatever this rank's generator held: tp shards of different models."""
    right = assemble.from_seed
    return patch.object(assemble, "from_seed", lambda known, seed: right(known, seed + dist.get_rank()))


def shards_swapped() -> Patched:
    """Ranks hold the shards of each matrix in another order."""
    right = weights.held_indices

    def swapped(parameter: Tensor) -> list[Tensor]:
        rows, *others = right(parameter)
        if isinstance(parameter, DTensor) and others:
            rows = (rows + parameter.shape[0] // 2) % parameter.shape[0]
        return [rows, *others]

    return patch.object(weights, "held_indices", swapped)


# What a rank reads


def same_rows_everywhere() -> Patched:
    return patch.object(loop, "data_rank", lambda mesh: 0)


def rows_by_global_rank() -> Patched:
    """tp ranks of one replica read different rows, as a DistributedSampler over all ranks makes them."""
    return patch.object(loop, "data_rank", lambda mesh: dist.get_rank() % mesh.size(1))


overlapping_rows = mistake(overlapping_batches=True)


def ranks_of_one_replica_read_apart() -> Patched:
    """Under tp alone, rank 1 reads the next batch."""
    right = Batches.batch

    def batch(self: Batches, step: int, dp_rank: int = 0, dp_size: int = 1) -> Batch:
        return right(self, step + dist.get_rank(), dp_rank, dp_size)

    return patch.object(Batches, "batch", batch)


# The loss


def counting(tokens: Callable[[list[Batch], int], float]) -> Patched:
    """Divide the loss by another count of tokens."""
    right = step.accumulate_gradients

    def accumulate(state: TrainState, micro_batches: list[Batch], setup: Setup) -> Tensor:
        objective = setup.objective
        assert isinstance(objective, FullCrossEntropy | ChunkedCrossEntropy)
        miscounted = replace(objective, scale=1 / tokens(micro_batches, setup.tokens_per_step))
        return right(state, micro_batches, replace(setup, objective=miscounted))

    return patch.object(step, "accumulate_gradients", accumulate)


def mean_of_each_rank() -> Patched:
    return counting(lambda micro, tokens: sum(batch.targets.numel() for batch in micro))


def mean_of_each_micro_batch() -> Patched:
    return counting(lambda micro, tokens: tokens / len(micro))


def softmax_over_own_shard() -> Patched:
    """Vocabulary-parallel loss without its all-reduces: each rank normalises over the entries that it holds."""

    stack = ExitStack()
    for method in ("all_reduce_max", "all_reduce_sum"):
        stack.enter_context(patch.object(VocabularyShard, method, lambda self, values: values))
    return stack


# Gradients


def then_gradients(change: Callable[[nn.Module, DeviceMesh], None]) -> Patched:
    """Do something to the gradients once they are whole."""
    right = step.reduce_partial_gradients

    def reduce(state: TrainState, plan: Plan, mesh: DeviceMesh) -> None:
        right(state, plan, mesh)
        change(state.model, mesh)

    return patch.object(step, "reduce_partial_gradients", reduce)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def scaled_by_tp() -> Patched:
    def scale(model: nn.Module, mesh: DeviceMesh) -> None:
        for parameter in model.parameters():
            gradient_of(parameter).mul_(mesh.size(2))

    return then_gradients(scale)


def averaged_over_dp() -> Patched:
    """FSDP's own division by its degree is left on, though the loss is divided by the global count already."""
    return patch.object(apply, "fsdp_modules", lambda model: [])


def norms_left_partial() -> Patched:
    """Gradients of norms under sequence parallelism are not summed over tp."""
    return patch.object(step, "reduce_partial_gradients", lambda state, plan, mesh: None)


def norms_averaged() -> Patched:
    def average(model: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in model.named_parameters():
            if "norm" in name:
                gradient_of(parameter).div_(mesh.size(2))

    return then_gradients(average)


def one_is_frozen() -> Patched:
    """A weight that no gradient reaches stays as it was."""

    def freeze(model: nn.Module, mesh: DeviceMesh) -> None:
        gradient_of(next(model.parameters())).zero_()

    return then_gradients(freeze)


kept_from_step_to_step = mistake(keep_gradients=True)


def last_micro_batch_only() -> Patched:
    right = step.accumulate_gradients

    def accumulate(state: TrainState, micro_batches: list[Batch], setup: Setup) -> Tensor:
        *first, last = micro_batches
        share = right(state, first, setup)
        for parameter in state.model.parameters():
            parameter.grad = None
        return share + right(state, [last], setup)

    return patch.object(step, "accumulate_gradients", accumulate)


def replicas_not_summed() -> Patched:
    """Shards are summed within each replica, and replicas go their own ways."""
    return patch.object(apply, "data_mesh", lambda mesh: mesh["dp_shard"])


def summed_in_float32() -> Patched:
    """Gradients are reduced in a narrower dtype than they were computed in."""

    def narrow(model: nn.Module, mesh: DeviceMesh) -> None:
        for parameter in model.parameters():
            gradient = gradient_of(parameter)
            gradient.copy_(gradient.float().double())

    return then_gradients(narrow)


# Norm, clipping, update


def norm_of_own_shard() -> Patched:
    """Clip and log by the norm of what this rank holds."""

    def own(gradients: list[Tensor], mesh: DeviceMesh) -> Tensor:
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        return torch.stack([g.norm() for g in local]).norm()

    return patch.object(step, "global_norm", own)


def replicated_counted_twice() -> Patched:
    """The squares of all parts are summed over tp, also of parameters that each rank holds whole."""

    def norm(gradients: list[Tensor], mesh: DeviceMesh) -> Tensor:
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        squares = torch.stack([g.square().sum() for g in local]).sum()
        dist.all_reduce(squares)
        return squares.sqrt()

    return patch.object(step, "global_norm", norm)


def never_clipped() -> Patched:
    right = step.clip_gradients
    return patch.object(step, "clip_gradients", lambda state, mesh, greatest: right(state, mesh, None))


def learning_rate_of_each_rank() -> Patched:
    right = step.learning_rate
    return patch.object(step, "learning_rate", lambda *a: right(*a) * (1 + dist.get_rank()))


def one_rank_skips_an_update() -> Patched:
    right = step.update

    def update(state: TrainState, norm: Tensor, setup: Setup) -> None:
        if state.step == 1 and dist.get_rank() == 1:
            state.optimizer.zero_grad()
        else:
            right(state, norm, setup)

    return patch.object(step, "update", update)


def evaluated_on_own_rows() -> Patched:
    """The held-out loss of this rank's rows, logged as that of all."""
    return patch.object(loop, "sum_over", lambda mesh, values, axes: values)
