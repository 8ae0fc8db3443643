"""Wrong plans: faults that trainers have had, each as a patch of a right run, and the quantity that shows it.

`python -m tpresearch.verify` must catch every one. `tests/verify/test_mutants.py` holds it to that.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel

from tpresearch.config import Config
from tpresearch.data import Batches, PackedCorpus
from tpresearch.launch.world import World
from tpresearch.parallel import init
from tpresearch.parallel import parallelize as sharding
from tpresearch.parallel import plan as planning
from tpresearch.parallel.rules import Compiled
from tpresearch.train import build, evaluate, step, trainer
from tpresearch.train.trainer import Trainer
from tpresearch.verify.trace import Trace, trace

BOTH = ("toy_mlp", "llama2_debug")
Patches = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Mutant:
    """A fault, under a plan where it matters."""

    name: str
    plan: str
    ranks: int
    caught_by: str
    """A quantity that must be out: the first place to look."""
    patches: Patches
    models: tuple[str, ...] = BOTH


# Weights and shards


def weights_of_each_rank() -> AbstractContextManager[Any]:
    """Whatever this rank's generator held: FSDP then trains rows of different models."""
    draw = build.materialize

    def materialize(model: nn.Module, device: torch.device, seed: int, **more: Any) -> None:
        draw(model, device, seed + dist.get_rank(), **more)

    return patch.object(build, "materialize", materialize)


def shards_swapped() -> AbstractContextManager[Any]:
    """Ranks hold the shards of each matrix in another order."""
    fill = init.fill

    def swapped(parameter: Tensor, full: Tensor) -> None:
        rolled = isinstance(parameter, DTensor) and full.dim() == 2
        fill(parameter, full.roll(full.shape[0] // 2, 0) if rolled else full)

    return patch.object(init, "fill", swapped)


# What a rank reads


def same_rows_everywhere() -> AbstractContextManager[Any]:
    return patch.object(trainer, "data_rank", lambda mesh: 0)


def rows_by_global_rank() -> AbstractContextManager[Any]:
    """tp ranks of one replica read different rows, as a DistributedSampler over all ranks makes them."""
    return patch.object(trainer, "data_rank", lambda mesh: dist.get_rank() % mesh.size(1))


def overlapping_rows() -> AbstractContextManager[Any]:
    """Seed step + dp_rank: rank 1 reads at step k what rank 0 reads at k + 1."""
    right = Batches.batch

    def batch(self: Batches, step: int, dp_rank: int = 0, dp_size: int = 1) -> Tensor:
        return right(self, step + dp_rank, 0, dp_size)

    return patch.object(Batches, "batch", batch)


def ranks_of_one_replica_read_apart() -> AbstractContextManager[Any]:
    """Under tp alone, rank 1 reads the next batch."""
    right = Batches.batch

    def batch(self: Batches, step: int, dp_rank: int = 0, dp_size: int = 1) -> Tensor:
        return right(self, step + dist.get_rank(), dp_rank, dp_size)

    return patch.object(Batches, "batch", batch)


# The loss


def counting(tokens: Callable[[Tensor, int], float]) -> AbstractContextManager[Any]:
    """Divide the loss by another count of tokens."""
    right = trainer.accumulate_gradients

    def accumulate(model: nn.Module, micro_batches: Any, global_tokens: int, *more: Any) -> Tensor:
        micro_batches = list(micro_batches)
        return right(model, micro_batches, tokens(micro_batches, global_tokens), *more)

    return patch.object(trainer, "accumulate_gradients", accumulate)


def mean_of_each_rank() -> AbstractContextManager[Any]:
    return counting(lambda micro, tokens: sum(rows[:, 1:].numel() for rows in micro))


def mean_of_each_micro_batch() -> AbstractContextManager[Any]:
    return counting(lambda micro, tokens: tokens / len(micro))


def softmax_over_own_shard() -> AbstractContextManager[Any]:
    """Vocabulary-parallel loss without its all-reduces: each rank normalises over the entries that it holds."""

    def loss(logits: Tensor, targets: Tensor) -> Tensor:
        own = logits.to_local() if isinstance(logits, DTensor) else logits
        entries = own.shape[-1]
        return nn.functional.cross_entropy(own.flatten(0, 1), targets.flatten() % entries, reduction="sum")

    stack = ExitStack()
    stack.enter_context(patch.object(step, "summed_cross_entropy", loss))
    stack.enter_context(patch.object(step, "loss_context", lambda vocab_parallel: nullcontext()))
    return stack


# Gradients


def then_gradients(change: Callable[[nn.Module, DeviceMesh], None]) -> AbstractContextManager[Any]:
    """Do something to the gradients once they are whole."""
    right = trainer.reduce_partial_gradients

    def reduce(model: nn.Module, plan: planning.Plan, mesh: DeviceMesh) -> None:
        right(model, plan, mesh)
        change(model, mesh)

    return patch.object(trainer, "reduce_partial_gradients", reduce)


def scaled_by_tp() -> AbstractContextManager[Any]:
    def scale(model: nn.Module, mesh: DeviceMesh) -> None:
        for parameter in model.parameters():
            parameter.grad.mul_(mesh.size(2))

    return then_gradients(scale)


def averaged_over_dp() -> AbstractContextManager[Any]:
    """FSDP's own division by its degree is left on, though the loss is divided by the global count already."""
    return patch.object(sharding, "fsdp_modules", lambda model: [])


def norms_left_partial() -> AbstractContextManager[Any]:
    """Gradients of norms under sequence parallelism are not summed over tp."""
    return patch.object(trainer, "reduce_partial_gradients", lambda model, plan, mesh: None)


def norms_averaged() -> AbstractContextManager[Any]:
    def average(model: nn.Module, mesh: DeviceMesh) -> None:
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.grad.div_(mesh.size(2))

    return then_gradients(average)


def one_is_frozen() -> AbstractContextManager[Any]:
    """A weight that no gradient reaches stays as it was."""

    def freeze(model: nn.Module, mesh: DeviceMesh) -> None:
        next(model.parameters()).grad.zero_()

    return then_gradients(freeze)


def kept_from_step_to_step() -> AbstractContextManager[Any]:
    return patch.object(torch.optim.Optimizer, "zero_grad", lambda self, set_to_none=True: None)


def last_micro_batch_only() -> AbstractContextManager[Any]:
    right = trainer.accumulate_gradients

    def accumulate(model: nn.Module, micro_batches: Any, *more: Any) -> Tensor:
        *first, last = list(micro_batches)
        share = right(model, first, *more)
        for parameter in model.parameters():
            parameter.grad = None
        return share + right(model, [last], *more)

    return patch.object(trainer, "accumulate_gradients", accumulate)


def replicas_not_summed() -> AbstractContextManager[Any]:
    """Replicas never all-reduce: each goes its own way."""
    return patch.object(step.FSDPModule, "set_requires_all_reduce", _never_all_reduce)


_all_reduce_when = step.FSDPModule.set_requires_all_reduce


def _never_all_reduce(module: Any, requires: bool, **more: Any) -> None:
    _all_reduce_when(module, False, **more)


def summed_in_float32() -> AbstractContextManager[Any]:
    """Gradients are reduced in a narrower dtype than they were computed in."""

    def narrow(model: nn.Module, mesh: DeviceMesh) -> None:
        for parameter in model.parameters():
            parameter.grad.copy_(parameter.grad.float().double())

    return then_gradients(narrow)


# Norm, clipping, update


def norm_of_own_shard() -> AbstractContextManager[Any]:
    """Clip and log by the norm of what this rank holds."""

    def own(gradients: list[Tensor], mesh: DeviceMesh) -> Tensor:
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        return torch.stack([g.norm() for g in local]).norm()

    return patch.object(step, "global_norm", own)


def replicated_counted_twice() -> AbstractContextManager[Any]:
    """The squares of all parts are summed over tp, also of parameters that each rank holds whole."""

    def norm(gradients: list[Tensor], mesh: DeviceMesh) -> Tensor:
        local = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        squares = torch.stack([g.square().sum() for g in local]).sum()
        dist.all_reduce(squares)
        return squares.sqrt()

    return patch.object(step, "global_norm", norm)


def never_clipped() -> AbstractContextManager[Any]:
    right = trainer.clip_gradients
    return patch.object(trainer, "clip_gradients", lambda model, mesh, greatest: right(model, mesh, None))


def learning_rate_of_each_rank() -> AbstractContextManager[Any]:
    right = trainer.learning_rate
    return patch.object(trainer, "learning_rate", lambda *a: right(*a) * (1 + dist.get_rank()))


def one_rank_skips_an_update() -> AbstractContextManager[Any]:
    right = Trainer.update

    def update(self: Trainer, step: int, norm: Tensor) -> None:
        if step == 1 and dist.get_rank() == 1:
            self.optimizer.zero_grad()
        else:
            right(self, step, norm)

    return patch.object(Trainer, "update", update)


def evaluated_on_own_rows() -> AbstractContextManager[Any]:
    """The held-out loss of this rank's rows, logged as that of all."""
    return patch.object(evaluate, "sum_over", lambda mesh, values, axes: values)


# Rules: what a sharding rule was wrong about


class BiasOnEachRank(RowwiseParallel):
    """A row-wise layer that adds its bias on every rank, before the sum."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        applied = super()._apply(module, device_mesh)
        module.register_forward_hook(lambda m, args, out: out + (device_mesh.size() - 1) * m.bias.to_local())
        return applied


class UnsummedBackward(ColwiseParallel):
    """A column-wise layer whose input's gradient, a part of a sum on each rank, is taken for the sum."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def prepare(m: nn.Module, args: tuple[Any, ...]) -> Any:
            whole = args[0]
            if not isinstance(whole, DTensor):
                whole = DTensor.from_local(whole, device_mesh, [Replicate()], run_check=False)
            return _TakenForWhole.apply(whole, device_mesh)

        module.register_forward_pre_hook(prepare)  # before torch's own
        return super()._apply(module, device_mesh)


class _TakenForWhole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: DTensor, mesh: DeviceMesh) -> DTensor:
        ctx.mesh = mesh
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> Any:
        return DTensor.from_local(gradient.to_local(), ctx.mesh, [Replicate()], run_check=False), None


def with_style(names: tuple[str, ...], build_style: Callable[[Compiled], ParallelStyle]) -> Patches:
    """The rules of these names carried out by another style than they say."""

    def patches() -> AbstractContextManager[Any]:
        right = Compiled.style

        def style(rule: Compiled) -> ParallelStyle:
            return build_style(rule) if rule.name in names else right(rule)

        return patch.object(Compiled, "style", style)

    return patches


def _unsummed_output(rule: Compiled) -> ParallelStyle:
    return RowwiseParallel(input_layouts=rule.src[0], output_layouts=Partial())


def _averaged_output(rule: Compiled) -> ParallelStyle:
    class Averaged(RowwiseParallel):
        def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
            applied = super()._apply(module, device_mesh)
            module.register_forward_hook(lambda m, args, out: out / device_mesh.size())
            return applied

    return Averaged(input_layouts=rule.src[0], output_layouts=rule.dst[0])


def without_rules(*names: str) -> Patches:
    """The plan as if these rules had been forgotten, and the check for it too."""

    def patches() -> AbstractContextManager[Any]:
        right = planning._expand

        def expand(compiled: list[Compiled], modules: list[str]) -> dict[str, Compiled]:
            return right([rule for rule in compiled if rule.name not in names], modules)

        stack = ExitStack()
        stack.enter_context(patch.object(planning, "_expand", expand))
        stack.enter_context(patch.object(planning, "_check_sequence", lambda *a: None))
        return stack

    return patches


def with_rule(name: str, style: str | None = None, **layouts: tuple[Placement | None, ...]) -> Patches:
    """The compiled plan with one rule's fields changed."""

    def patches() -> AbstractContextManager[Any]:
        right = planning._expand

        def expand(compiled: list[Compiled], modules: list[str]) -> dict[str, Compiled]:
            changed = [
                replace(rule, rule=replace(rule.rule, style=style or rule.rule.style), **layouts)
                if rule.name == name
                else rule
                for rule in compiled
            ]
            return right(changed, modules)

        return patch.object(planning, "_expand", expand)

    return patches


_ROW = ("out_proj", "ffn_out")
LLAMA, TOY = ("llama2_debug",), ("toy_mlp",)

MUTANTS = [
    Mutant("weights drawn per rank, sharded", "fsdp", 2, "initial weights", weights_of_each_rank),
    Mutant("weights drawn per rank, replicated", "ddp", 2, "between ranks", weights_of_each_rank),
    Mutant("weights drawn per rank, tensor-parallel", "tp", 2, "initial weights", weights_of_each_rank),
    Mutant("shards in another order", "tp", 2, "initial weights", shards_swapped),
    Mutant("all replicas read the same rows", "fsdp", 2, "gradients", same_rows_everywhere),
    Mutant("tp ranks read different rows", "fsdp_tp", 4, "loss", rows_by_global_rank),
    Mutant("overlapping batches", "ddp", 2, "gradients", overlapping_rows),
    Mutant("a tp rank reads the next batch", "tp", 2, "gradients", ranks_of_one_replica_read_apart),
    Mutant("loss averaged per rank", "fsdp", 2, "grad norm", mean_of_each_rank),
    Mutant("loss averaged per micro-batch", "fsdp_tp", 4, "grad norm", mean_of_each_micro_batch),
    Mutant("softmax over the own shard", "tp", 2, "loss", softmax_over_own_shard),
    Mutant("gradients scaled by tp", "tp", 2, "grad norm", scaled_by_tp),
    Mutant("gradients averaged over dp", "fsdp", 2, "grad norm", averaged_over_dp),
    Mutant("gradients averaged over dp, 2D", "fsdp_tp", 4, "gradients", averaged_over_dp),
    Mutant("norms' gradients left partial", "sp", 2, "gradients", norms_left_partial, LLAMA),
    Mutant("norms' gradients averaged", "fsdp_tp", 4, "gradients", norms_averaged, LLAMA),
    Mutant("a weight stays frozen", "tp", 2, "gradients", one_is_frozen),
    Mutant("gradients kept from step to step", "fsdp", 2, "gradients", kept_from_step_to_step),
    Mutant("the last micro-batch only", "ddp", 2, "gradients", last_micro_batch_only),
    Mutant("replicas not summed", "hsdp", 4, "between ranks", replicas_not_summed),
    Mutant("gradients rounded to float32", "fsdp", 2, "gradients", summed_in_float32),
    Mutant("norm of the own shard", "fsdp", 2, "grad norm", norm_of_own_shard),
    Mutant("norm counts replicated weights twice", "tp", 2, "grad norm", replicated_counted_twice),
    Mutant("never clipped", "fsdp_tp", 4, "weights", never_clipped),
    Mutant("another learning rate on each rank", "ddp", 2, "between ranks", learning_rate_of_each_rank),
    Mutant("one rank skips an update", "tp", 2, "weights", one_rank_skips_an_update),
    Mutant("held-out loss of the own rows", "fsdp", 2, "held-out loss", evaluated_on_own_rows),
    Mutant("forward sum left out", "tp", 2, "loss", with_style(_ROW, _unsummed_output)),
    Mutant("forward sum averaged", "tp", 2, "loss", with_style(_ROW, _averaged_output)),
    Mutant("backward sum left out", "tp", 2, "gradients", with_style(("ffn_in", "in_proj"), lambda rule: UnsummedBackward())),
    Mutant("bias added on each rank", "tp", 2, "loss", with_style(("out_proj",), lambda rule: BiasOnEachRank(input_layouts=rule.src[0], output_layouts=rule.dst[0])), TOY),
    Mutant("a rule dropped: norms", "sp", 2, "gradients", without_rules("norms", "norm"), LLAMA),
    Mutant("a rule dropped: the row-wise one", "tp", 2, "did not run", without_rules(*_ROW)),
    Mutant("a style swapped: sequence for whole", "sp", 2, "gradients", with_rule("norms", "input", src=(None,), dst=(None,)), LLAMA),
    Mutant("a layout wrong: whole taken for a part", "tp", 2, "did not run", with_rule("embed", dst=(Shard(1),))),
]  # fmt: skip


def run(world: World, name: str, cfg: Config, corpus: PackedCorpus, steps: int) -> Trace | str | None:
    """The trace of a mutant, or why it did not run; returned by rank 0 alone."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    try:
        with mutant.patches():
            found: Trace | str = trace(cfg, corpus, world, steps)
    except (
        RuntimeError,
        ValueError,
        AssertionError,
    ) as error:  # what torch raises for shapes that do not fit
        found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found if world.rank == 0 else None
