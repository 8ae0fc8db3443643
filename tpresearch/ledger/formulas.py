"""What one optimizer step must send, by closed formulas: the ledger's `expected`, which must equal `measured`.

Per micro-batch of b rows of s tokens, e bytes per element, over t tensor-parallel and d data-sharding ranks:

- TP: an all-reduce of b s h after attention and after the feed-forward, and one each way back
  (Megatron-LM, arXiv 1909.08053, section 3); with sequence parallelism each is a reduce-scatter and an
  all-gather (arXiv 2205.05198, section 4.2). `plan/collectives.py` has them rule by rule.
- The vocabulary-parallel loss: three all-reduces of b s numbers (arXiv 1909.08053, section 3); in chunks of c tokens
  three of c numbers for each. With train.loss=sum, one all-reduce of one number where outputs are sharded.
- FSDP, of P parameters: an all-gather of e_p P in forward, another in backward where weights were freed (all but the last block's), and a
  reduce-scatter of e_g P (arXiv 1910.02054, section 7; arXiv 2304.11277). HSDP and DDP: an all-reduce of
  e_g P / d over the replicas, once per step.
- Norms under sequence parallelism: one all-reduce over tp, once per step, of their gradients' shards.
- Clipping: one number for each axis that shards something.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import nn

from tpresearch.config.axes import REPLICATE, SHARD
from tpresearch.config.choices import Loss
from tpresearch.config.schema import Checkpointing, Config, Dtype
from tpresearch.config.validate import micro_batch_size, micro_batches
from tpresearch.ledger.entries import Entry, Event, entries_of
from tpresearch.plan.collectives import rule_collectives
from tpresearch.plan.compiler import Plan, fsdp_local_shape, unit_of
from tpresearch.plan.rules import tensors_of

ELEMENT_BYTES = {Dtype.float64: 8, Dtype.float32: 4, Dtype.bfloat16: 2}

Collective = tuple[str, str, str, str, int]
"""(axis, phase, issuer, collective, bytes of the whole tensor)"""


def expected_entries(model: nn.Module, plan: Plan, cfg: Config) -> list[Entry] | None:
    """The ledger of rank 0 for one step, or None if no formula is known.

    There is none for frozen parameters in a block or under a rule, which may leave out more than their own gradient, nor for
    layers that run more than once on the same rows, as those of a recurrent depth do, or on some of them, as experts.
    Under a tensor plan there is none for full checkpointing, whose recomputation sends again what its early stop does
    not cut off, nor for a budget, for layers in checkpoints of the model's own, for float8, whose scales are agreed on, for a rule
    with a ParallelStyle of the user's own, and where a rule does not determine the width of what it sends, or converts inputs of
    several lengths.

    Args:
        model: on the meta device, whole.
    """
    sends_again = cfg.parallel.activation_checkpointing in (Checkpointing.full, Checkpointing.budget)
    if plan.rules and (sends_again or plan.float8):
        return None
    if not plan.probe.recomputed.isdisjoint(plan.rules):
        return None
    if any(rule.rule.target for rule in plan.rules.values()):
        return None
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if any(name.rpartition(".")[0] in plan.rules or unit_of(name, plan.blocks) for name in frozen):
        return None
    gathered = (*plan.blocks, *plan.end_layers) if plan.sizes.shards > 1 else ()
    if any(plan.probe.called.count(name) != 1 for name in (*plan.rules, *gathered)):
        return None
    if any(sent.width == 0 for name in plan.rules for sent in rule_collectives(name, model, plan)):
        return None
    if any(len(_token_counts(name, plan)) > 1 for name in plan.rules):
        return None
    sizes = plan.sizes.nontrivial()
    collectives = (found for found in _collectives(model, plan, cfg) if found[0] in sizes)
    return entries_of(Event(*found, sizes[found[0]]) for found in collectives)


def _collectives(model: nn.Module, plan: Plan, cfg: Config) -> Iterator[Collective]:
    rows, count = micro_batch_size(cfg, plan.sizes), micro_batches(cfg, plan.sizes)
    for index in range(count):
        yield from _tensor_plan_collectives(model, plan, cfg, rows * cfg.data.seq_len)
        yield from _data_plan_collectives(model, plan, cfg, last=index == count - 1)
    yield from _partial_gradient_collectives(model, plan, cfg)
    yield from _clipping_collectives(plan, cfg)


def _tensor_plan_collectives(model: nn.Module, plan: Plan, cfg: Config, tokens: int) -> Iterator[Collective]:
    element = ELEMENT_BYTES[cfg.train.dtype]
    for name, rule in plan.rules.items():
        for sent in rule_collectives(name, model, plan):
            if sent.per_token:
                (count,) = _token_counts(name, plan) or {tokens}
                yield rule.axis, sent.phase, "dtensor", sent.collective, sent.width * element * count
    split = next((rule.axis for rule in plan.rules.values() if rule.output_stays_sharded), None)
    if split and cfg.train.loss is Loss.sum:
        yield split, "loss", "loss", "all_reduce", max(element, 4)
    elif split:
        for part in loss_chunks(plan, cfg, tokens):
            for _ in ("greatest logit", "sum of exponentials", "logit of the target"):
                yield split, "loss", "loss", "all_reduce", part * max(element, 4)


def _token_counts(name: str, plan: Plan) -> set[int]:
    """How many tokens of a micro-batch there are in what the rule on a module converts: learned positions have those of one row."""
    rule, shapes = plan.rules[name], plan.probe.shapes.get(name)
    given = "input" if rule.rule.style == "input" else "output"  # an embedding's input has no features
    converted = tensors_of(rule, shapes) if shapes else ()
    return {
        math.prod(shape[:-1]) for _, side, layout, shape in converted if side == given and layout and shape
    }


def loss_chunks(plan: Plan, cfg: Config, tokens: int) -> list[int]:
    """Number of tokens whose logits exist at once, for a micro-batch of `tokens`."""
    count = -(-tokens // cfg.train.loss_chunk) if cfg.train.loss_chunk and plan.chunked_head else 1
    return [tokens // count + (index < tokens % count) for index in range(count)]


def _partial_gradient_collectives(model: nn.Module, plan: Plan, cfg: Config) -> Iterator[Collective]:
    partial = plan.partial_grads(model)
    if partial:
        axis = plan.rules[next(iter(partial)).rpartition(".")[0]].axis
        local = sum(math.prod(fsdp_local_shape(name, model, plan)) for name in partial)
        yield axis, "backward", "step", "all_reduce", local * max(ELEMENT_BYTES[cfg.train.dtype], 4)


def _data_plan_collectives(model: nn.Module, plan: Plan, cfg: Config, last: bool) -> Iterator[Collective]:
    weight = gradient = ELEMENT_BYTES[cfg.train.dtype]
    if cfg.train.dtype is Dtype.bfloat16:
        gradient = ELEMENT_BYTES[cfg.parallel.fsdp.reduce_dtype]
    # By what is gathered together: elements of all parameters, and of those that are trained.
    units: dict[str | None, list[int]] = {}
    for name, parameter in model.named_parameters():
        # Of its part by its rule, the first dim filled up so that it divides over the data shards.
        padded = plan.sizes.shards * math.prod(fsdp_local_shape(name, model, plan))
        unit = units.setdefault(plan.unit_of(name), [0, 0])
        unit[0] += padded
        unit[1] += padded * parameter.requires_grad
    for name_of_unit, (gathered, trained) in units.items():
        yield SHARD.name, "forward", "fsdp", "all_gather", gathered * weight
        if name_of_unit in plan.blocks[:-1] and cfg.parallel.fsdp.reshard_after_forward:
            yield SHARD.name, "backward", "fsdp", "all_gather", gathered * weight
        if trained:
            yield SHARD.name, "backward", "fsdp", "reduce_scatter", trained * gradient
        if trained and last:
            yield REPLICATE.name, "backward", "fsdp", "all_reduce", trained // plan.sizes.shards * gradient


def _clipping_collectives(plan: Plan, cfg: Config) -> Iterator[Collective]:
    number = 8 if cfg.train.dtype is Dtype.float64 else 4
    yield SHARD.name, "clip", "clip", "all_reduce", number
    for axis in dict.fromkeys(rule.axis for rule in plan.rules.values()):
        yield axis, "clip", "clip", "all_reduce", number
