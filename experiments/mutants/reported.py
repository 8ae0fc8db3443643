"""Faults from trainers' issue trackers in 2025 and 2026, as patches of a correct run.

Most are from NVIDIA/Megatron-LM#7452, "Silent numerical-correctness bugs in Megatron Core parallelism composition"; each
says what it is modelled on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from mutants.faults import Patched, gradient_of, then_gradients
from mutants.wrong_rules import UnsummedBackward
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle

from tpresearch.data.batches import Batch
from tpresearch.parallel import norm
from tpresearch.plan.rules import ResolvedRule
from tpresearch.train import step
from tpresearch.train.state import TrainState
from tpresearch.train.step import Setup


class WithoutSync:
    """torch.distributed as FSDP and `GradientReducer` see it, but that an all-reduce leaves everything as it was."""

    def __getattr__(self, name: str) -> Any:
        return getattr(dist, name)

    def all_reduce(self, *_: Any, **__: Any) -> WithoutSync:
        return self

    def wait(self) -> None:
        """What was asked for is done at once."""


@contextmanager
def sync_is_a_no_op() -> Iterator[None]:
    """Gradients are not summed between replicas, by a call that looks as if they were (NVIDIA/Megatron-LM#7452 and
    #1685; over a group of one rank: ByteDance-Seed/VeOmni#1059)."""
    of_fsdp, own = (
        "torch.distributed.fsdp._fully_shard._fsdp_collectives.dist",
        "tpresearch.parallel.reducer.dist",
    )
    with patch(of_fsdp, WithoutSync()), patch(own, WithoutSync()):
        yield


def sum_is_thrown_away() -> Patched:
    """The all-reduce works on a contiguous copy of a gradient, and the gradient itself stays partial
    (`copy_to_tensor_model_parallel_region` of a transposed tensor: NovaSky-AI/SkyRL#1886)."""

    def of_copies(mesh: DeviceMesh, tensors: list[Tensor], axis: str) -> None:
        for tensor in tensors:
            dist.all_reduce(tensor.clone(), group=mesh.get_group(axis))

    return patch.object(step, "sum_coalesced", of_copies)


def sum_is_made_twice() -> Patched:
    """Norms' gradients are summed over tp by the layer and by the trainer again (inclusionAI/AReno#496)."""
    right = step.sum_coalesced

    def twice(mesh: DeviceMesh, tensors: list[Tensor], axis: str) -> None:
        right(mesh, tensors, axis)
        right(mesh, tensors, axis)

    return patch.object(step, "sum_coalesced", twice)


def replicas_counted_in_the_norm() -> Patched:
    """Squares are summed over all data-parallel ranks, not over those that shard: the norm is sqrt(2) times too large
    with two replicas, and clips too much (ByteDance-Seed/VeOmni#184 and #862)."""
    right = step.global_norm

    def inflated(gradients: list[Tensor], mesh: DeviceMesh) -> Tensor:
        return right(gradients, mesh) * mesh.size(0) ** 0.5

    return patch.object(step, "global_norm", inflated)


def tensor_replicas_counted_in_the_norm() -> Patched:
    """Weights that every tp rank holds whole are marked as split over tp, and their squares counted once per rank
    (ROCm/TransformerEngine#715)."""
    right = norm.local_shard

    def marked(tensor: Tensor) -> tuple[Tensor, frozenset[str]]:
        local, axes = right(tensor)
        return local, axes | {"tp"}

    return patch.object(norm, "local_shard", marked)


def a_shard_taken_for_whole_in_the_norm() -> Patched:
    """A weight that is sharded over tp is not marked as such: its squares on one rank stand for all of them, another
    number on each (attention sinks, NVIDIA/Megatron-LM#7452)."""
    right = norm.local_shard

    def unmarked(tensor: Tensor) -> tuple[Tensor, frozenset[str]]:
        local, axes = right(tensor)
        return local, frozenset() if local.dim() == 2 and local.shape[0] == tensor.shape[0] else axes

    return patch.object(norm, "local_shard", unmarked)


class SummedInOneBranch:
    """Of the layers that a rule covers, every second takes its part of the input's gradient for the sum."""

    def __init__(self) -> None:
        self.layers = 0

    def __call__(self, rule: ResolvedRule, right: Callable[[ResolvedRule], ParallelStyle]) -> ParallelStyle:
        self.layers += 1
        return UnsummedBackward() if self.layers % 2 else right(rule)


def forgotten_in_one_branch() -> Patched:
    """Two column-wise layers share an input; the gradient that comes back through one of them is not summed over tp
    (the K-RoPE branch of MLA: NVIDIA/Megatron-LM#6839; pytorch/torchtitan#1373)."""
    right, branch = ResolvedRule.style, SummedInOneBranch()

    def style(rule: ResolvedRule) -> ParallelStyle:
        return branch(rule, right) if rule.name in ("ffn_in", "in_proj") else right(rule)

    return patch.object(ResolvedRule, "style", style)


def stale_gradient_buffer() -> Patched:
    """The buffer that received the gathered weights is not zeroed before gradients are added to it
    (NVIDIA/Megatron-LM#4609)."""

    def add(model: nn.Module, mesh: DeviceMesh) -> None:
        for parameter in model.parameters():
            gradient_of(parameter).add_(parameter.detach())

    return then_gradients(add)


def divided_for_the_log_only() -> Patched:
    """The loss is divided by its tokens after the backward pass: logged right, gradients as many times too large
    (pipeline stages, pytorch/torchtitan#2972)."""
    right = step.accumulate_gradients

    def accumulate(state: TrainState, micro_batches: list[Batch], setup: Setup) -> Tensor:
        share = right(state, micro_batches, setup)
        for parameter in state.model.parameters():
            gradient_of(parameter).mul_(setup.tokens_per_step)
        return share

    return patch.object(step, "accumulate_gradients", accumulate)
