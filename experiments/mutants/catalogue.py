"""Wrong plans: known faults of trainers, each a patch of a correct run, and the quantity that reveals it.

`python -m tpresearch.verify` must catch every one. `tests/verify/test_mutants.py` holds it to that.
"""

from __future__ import annotations

from dataclasses import dataclass

from mutants import faults, reported
from mutants.wrong_rules import (
    BiasOnEachRank,
    Patches,
    UnsummedBackward,
    averaged_output,
    unsummed_output,
    with_rule,
    with_style,
    without_rules,
)
from torch.distributed.tensor import Shard

from tpresearch.config import Config, ConfigError
from tpresearch.config.world import World
from tpresearch.data.rows import PackedCorpus
from tpresearch.verify.trace import RunTrace, trace_run

BOTH = ("toy_mlp", "llama2_debug")


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


_ROW = ("out_proj", "ffn_out")
LLAMA, TOY = ("llama2_debug",), ("toy_mlp",)

MUTANTS = [
    Mutant("weights drawn per rank, sharded", "fsdp", 2, "initial weights", faults.weights_of_each_rank),
    Mutant("weights drawn per rank, replicated", "ddp", 2, "between ranks", faults.weights_of_each_rank),
    Mutant("weights drawn per rank, tensor-parallel", "tp", 2, "initial weights", faults.weights_of_each_tp_rank),
    Mutant("shards in another order", "tp", 2, "initial weights", faults.shards_swapped),
    Mutant("all replicas read the same rows", "fsdp", 2, "gradients", faults.same_rows_everywhere),
    Mutant("tp ranks read different rows", "fsdp_tp", 4, "loss", faults.rows_by_global_rank),
    Mutant("overlapping batches", "ddp", 2, "gradients", faults.overlapping_rows),
    Mutant("a tp rank reads the next batch", "tp", 2, "gradients", faults.ranks_of_one_replica_read_apart),
    Mutant("loss averaged per rank", "fsdp", 2, "grad norm", faults.mean_of_each_rank),
    Mutant("loss averaged per micro-batch", "fsdp_tp", 4, "grad norm", faults.mean_of_each_micro_batch),
    Mutant("softmax over the own shard", "tp", 2, "loss", faults.softmax_over_own_shard),
    Mutant("gradients scaled by tp", "tp", 2, "grad norm", faults.scaled_by_tp),
    Mutant("gradients averaged over dp", "fsdp", 2, "grad norm", faults.averaged_over_dp),
    Mutant("gradients averaged over dp, 2D", "fsdp_tp", 4, "gradients", faults.averaged_over_dp),
    Mutant("norms' gradients left partial", "sp", 2, "gradients", faults.norms_left_partial, LLAMA),
    Mutant("norms' gradients averaged", "fsdp_tp", 4, "gradients", faults.norms_averaged, LLAMA),
    Mutant("a weight stays frozen", "tp", 2, "gradients", faults.one_is_frozen),
    Mutant("gradients kept from step to step", "fsdp", 2, "gradients", faults.kept_from_step_to_step),
    Mutant("the last micro-batch only", "ddp", 2, "gradients", faults.last_micro_batch_only),
    Mutant("replicas not summed", "hsdp", 4, "between ranks", faults.replicas_not_summed),
    Mutant("gradients rounded to float32", "fsdp", 2, "gradients", faults.summed_in_float32),
    Mutant("norm of the own shard", "fsdp", 2, "grad norm", faults.norm_of_own_shard),
    Mutant("norm counts replicated weights twice", "tp", 2, "grad norm", faults.replicated_counted_twice),
    Mutant("never clipped", "fsdp_tp", 4, "weights", faults.never_clipped),
    Mutant("another learning rate on each rank", "ddp", 2, "between ranks", faults.learning_rate_of_each_rank),
    Mutant("one rank skips an update", "tp", 2, "weights", faults.one_rank_skips_an_update),
    Mutant("held-out loss of the own rows", "fsdp", 2, "held-out loss", faults.evaluated_on_own_rows),
    Mutant("gradient sync is a no-op", "hsdp", 4, "between ranks", reported.sync_is_a_no_op),
    Mutant("gradient sync is a no-op, ddp", "ddp", 2, "between ranks", reported.sync_is_a_no_op),
    Mutant("a sum is thrown away", "sp", 2, "gradients", reported.sum_is_thrown_away, LLAMA),
    Mutant("a sum is made twice", "sp", 2, "gradients", reported.sum_is_made_twice, LLAMA),
    Mutant("norm counts replicas", "hsdp", 4, "grad norm", reported.replicas_counted_in_the_norm),
    Mutant("norm counts tp replicas", "tp", 2, "grad norm", reported.tensor_replicas_counted_in_the_norm),
    Mutant("norm takes a shard for the whole", "tp", 2, "grad norm", reported.a_shard_taken_for_whole_in_the_norm),
    Mutant("backward sum forgotten in one branch", "tp", 2, "gradients", reported.forgotten_in_one_branch),
    Mutant("gradients in a stale buffer", "fsdp", 2, "gradients", reported.stale_gradient_buffer),
    Mutant("loss divided for the log only", "fsdp_tp", 4, "grad norm", reported.divided_for_the_log_only),
    Mutant("forward sum left out", "tp", 2, "loss", with_style(_ROW, unsummed_output)),
    Mutant("forward sum averaged", "tp", 2, "loss", with_style(_ROW, averaged_output)),
    Mutant("backward sum left out", "tp", 2, "gradients", with_style(("ffn_in", "in_proj"), lambda rule: UnsummedBackward())),
    Mutant("bias added on each rank", "tp", 2, "loss", with_style(("out_proj",), lambda rule: BiasOnEachRank(input_layouts=rule.src[0], output_layouts=rule.dst[0])), TOY),
    Mutant("a rule dropped: norms", "sp", 2, "gradients", without_rules("norms", "norm"), LLAMA),
    Mutant("a rule dropped: the row-wise one", "tp", 2, "did not run", without_rules(*_ROW)),
    Mutant("a style swapped: sequence for whole", "sp", 2, "gradients", with_rule("norms", "input", src=(None,), dst=(None,)), LLAMA),
    Mutant("a layout wrong: whole taken for a part", "tp", 2, "did not run", with_rule("embed", dst=(Shard(1),))),
]  # fmt: skip


def run(world: World, name: str, cfg: Config, corpus: PackedCorpus, steps: int) -> RunTrace | str | None:
    """The trace of a mutant, or why it did not run; returned by rank 0 alone."""
    mutant = next(mutant for mutant in MUTANTS if mutant.name == name)
    try:
        with mutant.patches():
            found: RunTrace | str = trace_run(cfg, corpus, world, steps)
    except (ConfigError, RuntimeError, ValueError, AssertionError) as error:
        found = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return found if world.rank == 0 else None
