"""What one optimizer step must send, by closed formulas: the ledger's `expected`, to be equal to its `measured`.

Per micro-batch of b rows of s tokens, e bytes an element, over t tensor-parallel and d data-sharding ranks:

- TP: an all-reduce of b s h after attention and after the feed-forward, and one each way back
  (Megatron-LM, arXiv 1909.08053, section 3); with sequence parallelism each is a reduce-scatter and an
  all-gather (arXiv 2205.05198, section 4.2). `plan/effects.py` has them rule by rule.
- The vocabulary-parallel loss: three all-reduces of b s numbers (arXiv 1909.08053, section 3); the sum of outputs
  that are split: one all-reduce of one number.
- FSDP, of P parameters: an all-gather of e_p P in forward, another in backward where weights were freed, and a
  reduce-scatter of e_g P (arXiv 1910.02054, section 7; arXiv 2304.11277). HSDP and DDP: an all-reduce of
  e_g P / d over the replicas, once a step.
- Norms under sequence parallelism: one all-reduce over tp, once a step, of their gradients' shards.
- Clipping: one number for each axis that shards something.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from tpresearch.config.schema import Checkpointing, Config, Dtype, Loss
from tpresearch.ledger.communication import Entry, ring_bytes
from tpresearch.plan.compiler import Plan, local_shape
from tpresearch.plan.effects import rule_sends

_BYTES = {Dtype.float64: 8, Dtype.float32: 4, Dtype.bfloat16: 2}

Collective = tuple[str, str, str, str, int]
"""(axis, phase, issuer, collective, bytes of the whole tensor)"""


def expected_entries(model: nn.Module, plan: Plan, cfg: Config) -> list[Entry] | None:
    """The ledger of rank 0 for one step, or None where no formula is known.

    There is none for full checkpointing, whose recomputation sends again what its early stop does not cut
    off, nor for a rule with a ParallelStyle of the user's own, nor where a rule does not tell the width of what
    it moves.

    Args:
        model: on the meta device, whole.
    """
    if plan.rules and cfg.parallel.activation_checkpointing is Checkpointing.full:
        return None
    if any(rule.rule.target for rule in plan.rules.values()):
        return None
    if any(sent.width == 0 for name in plan.rules for sent in rule_sends(name, model, plan)):
        return None
    sizes = plan.sizes.live()
    counts: dict[tuple[str, str, str, str], list[int]] = {}
    for axis, phase, issuer, collective, whole in _collectives(model, plan, cfg):
        if axis in sizes:
            entry = counts.setdefault((axis, phase, issuer, collective), [0, 0, 0])
            for index, amount in enumerate((1, whole, ring_bytes(collective, whole, sizes[axis]))):
                entry[index] += amount
    return [Entry(*key, *amounts) for key, amounts in sorted(counts.items())]


def _collectives(model: nn.Module, plan: Plan, cfg: Config) -> Iterator[Collective]:
    share = cfg.train.global_batch_size // plan.sizes.dp
    rows = cfg.train.micro_batch_size or share
    micro_batches = share // rows
    for index in range(micro_batches):
        last = index == micro_batches - 1
        yield from _of_tensor_plan(model, plan, cfg, rows * cfg.data.seq_len)
        yield from _of_data_plan(model, plan, cfg, last)
    yield from _of_partial_gradients(model, plan, cfg)
    yield from _of_clipping(plan, cfg)


def _of_tensor_plan(model: nn.Module, plan: Plan, cfg: Config, tokens: int) -> Iterator[Collective]:
    element = _BYTES[cfg.train.dtype]
    for name in plan.rules:
        for sent in rule_sends(name, model, plan):
            if sent.per_token:
                yield "tp", sent.phase, "dtensor", sent.collective, sent.width * element * tokens
    if plan.loss_parallel and cfg.train.loss is Loss.sum:
        yield "tp", "loss", "loss", "all_reduce", max(element, 4)
    elif plan.loss_parallel:
        for _ in ("greatest logit", "sum of exponentials", "logit of the target"):
            yield "tp", "loss", "loss", "all_reduce", tokens * max(element, 4)


def _of_partial_gradients(model: nn.Module, plan: Plan, cfg: Config) -> Iterator[Collective]:
    shards = plan.sizes.dp_shard
    local = [-(-p.shape[0] // shards) * math.prod(p.shape[1:]) for p in plan.partial(model).values()]
    if local:
        yield "tp", "backward", "step", "all_reduce", sum(local) * max(_BYTES[cfg.train.dtype], 4)


def _of_data_plan(model: nn.Module, plan: Plan, cfg: Config, last: bool) -> Iterator[Collective]:
    shards = plan.sizes.dp_shard
    weight = _BYTES[cfg.train.dtype]
    gradient = _BYTES[cfg.parallel.fsdp.reduce_dtype] if cfg.train.dtype is Dtype.bfloat16 else weight
    for group, is_block in _groups(model, plan):
        padded = sum(_padded(name, parameter, plan, model) for name, parameter in group)
        yield "dp_shard", "forward", "fsdp", "all_gather", padded * weight
        if is_block and cfg.parallel.fsdp.reshard_after_forward:
            yield "dp_shard", "backward", "fsdp", "all_gather", padded * weight
        yield "dp_shard", "backward", "fsdp", "reduce_scatter", padded * gradient
        if last:
            yield "dp_replicate", "backward", "fsdp", "all_reduce", padded // shards * gradient


def _groups(model: nn.Module, plan: Plan) -> Iterator[tuple[list[tuple[str, nn.Parameter]], bool]]:
    """The parameters that FSDP gathers together: those of each block, and all others."""
    others = dict(model.named_parameters())
    for block in plan.blocks:
        mine = [(name, others.pop(name)) for name in list(others) if name.startswith(block + ".")]
        yield mine, True
    if others:
        yield list(others.items()), False


def _padded(name: str, parameter: nn.Parameter, plan: Plan, model: nn.Module) -> int:
    """Elements of a parameter's tp shard, its first dim filled up so that it divides over the data shards."""
    first, *rest = local_shape(name, parameter, plan, model.get_submodule(name.rpartition(".")[0]))
    shards = plan.sizes.dp_shard
    return -(-first // shards) * shards * math.prod(rest)


def _of_clipping(plan: Plan, cfg: Config) -> Iterator[Collective]:
    number = 8 if cfg.train.dtype is Dtype.float64 else 4
    yield "dp_shard", "clip", "clip", "all_reduce", number
    if plan.rules:
        yield "tp", "clip", "clip", "all_reduce", number
