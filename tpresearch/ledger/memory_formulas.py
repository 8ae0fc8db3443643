"""What one optimizer step must hold, by closed formulas, for comparison with the memory ledger.

Elements of rank 0, over t tensor-parallel and d data-sharding ranks; e bytes per element of the computation:

- Parameters, gradients, optimizer state: each rank's shards, exactly; AdamW keeps two numbers per parameter
  (arXiv 1910.02054, section 3.1).
- Activations: what each op saves for backward, per token (the method of arXiv 2205.05198, section 4.1, for the
  ops of this model): for Llama2 and the toy model.
- Temporaries depend on the order in which ops free their inputs: no formula is claimed.
"""

from __future__ import annotations

import math

from torch import nn

from tpresearch.config.choices import Loss, OptimizerName
from tpresearch.config.schema import Checkpointing, Config, Dtype
from tpresearch.config.validate import has_master_weights, micro_batch_size, micro_batches, uses_fully_shard
from tpresearch.ledger.formulas import ELEMENT_BYTES
from tpresearch.models.llama2 import Block, Llama2
from tpresearch.models.toy_mlp import ToyLM
from tpresearch.plan.compiler import Plan, fsdp_local_shape, tp_local_shape


def expected_memory(model: nn.Module, plan: Plan, cfg: Config, device: str = "cpu") -> dict[str, int | None]:
    """Bytes by kind of memory; None if no formula is known.

    Args:
        model: on the meta device, whole. device: its type, since a CPU's RMSNorm keeps more than the fused one.
    """
    if any(rule.rule.target for rule in plan.rules.values()):  # a style of one's own
        return dict.fromkeys(("parameters", "gradients", "optimizer", "activations", "temporaries"))
    weight = ELEMENT_BYTES[cfg.train.weight_dtype]
    masters = has_master_weights(cfg, plan.sizes)
    master = 2 if cfg.optimizer.split_masters else weight  # beside the model's copy
    shards = {name: math.prod(fsdp_local_shape(name, model, plan)) for name, _ in model.named_parameters()}
    trained = [shards[name] for name, p in model.named_parameters() if p.requires_grad]
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    return {
        "parameters": sum(shards.values()) * (2 if masters else weight) + buffers,
        "gradients": sum(trained) * weight,
        "optimizer": _optimizer_bytes(cfg, sum(trained), len(trained))
        + (sum(shards.values()) * master if masters else 0),
        "activations": _activation_bytes(model, plan, cfg, device),
        "temporaries": None,
    }


def _optimizer_bytes(cfg: Config, elements: int, parameters: int) -> int:
    counts = 4 * parameters if cfg.optimizer.name is OptimizerName.adamw else 0  # of steps, one for each
    dtype = Dtype(cfg.optimizer.moment_dtype or cfg.train.weight_dtype)
    return cfg.optimizer.moments * elements * ELEMENT_BYTES[dtype] + counts


def _activation_bytes(model: nn.Module, plan: Plan, cfg: Config, device: str) -> int | None:
    """Bytes of one micro-batch, which are freed before the next begins, and of the step's tokens and targets, which stay."""
    mode = cfg.parallel.activation_checkpointing
    if plan.float8 or mode is Checkpointing.budget:
        return None
    if mode is not Checkpointing.none and plan.blocks != [f"layers.{n}" for n in range(len(plan.blocks))]:
        return None  # the toy model's block, or units of one's own
    tokens, element = micro_batch_size(cfg, plan.sizes) * cfg.data.seq_len, ELEMENT_BYTES[cfg.train.dtype]
    if type(model) is Llama2:
        kept = _llama2_activation_bytes(model, plan, cfg, element, device)
    elif type(model) is ToyLM:
        kept = _toy_activation_bytes(model, plan, element)
    else:
        return None  # a model of one's own, with another forward than the one it inherits, or frozen weights
    if kept is None:
        return None
    vocabulary = model.output.out_features
    logits = -(-vocabulary // plan.sizes.tp) if plan.loss_parallel else vocabulary
    parts, wide = micro_batches(cfg, plan.sizes), max(element, 4)
    softmax = logits * wide
    # Of all micro-batches: each takes its part of one tensor. Targets, and tokens where rules make DTensors of them; int64.
    indices = 8 * tokens * parts * (1 + bool(plan.rules))
    scalars = wide * (1 + (parts > 1))  # the loss, and that of the micro-batch before
    if cfg.train.loss is Loss.sum:
        # The gradient is 1, whatever the logits are; there are no targets, and nothing is scaled.
        softmax, indices, scalars = 0, indices - 8 * tokens * parts, scalars - wide
    elif cfg.train.loss_chunk and plan.chunked_head:
        # In the place of the hidden states, which are as large, their gradient; and the output layer's.
        early = _early_gradient_bytes(model, plan, cfg, element)
        return round(tokens * kept) + indices + scalars + early
    return round(tokens * (kept + softmax)) + indices + scalars + wide  # and the loss before it is scaled


def _early_gradient_bytes(model: Llama2 | ToyLM, plan: Plan, cfg: Config, element: int) -> int:
    """Bytes of the output layer's gradient, made with the loss, where it does not directly become the parameter's own."""
    weight = model.output.weight
    # Over replicas a unit of one parameter is summed where its gradient is, unless in another dtype.
    summed_there = "output" in plan.end_layers and (
        cfg.train.dtype is not Dtype.bfloat16 or cfg.parallel.fsdp.reduce_dtype is Dtype.bfloat16
    )
    wrapped, masters = uses_fully_shard(cfg.parallel, plan.sizes), has_master_weights(cfg, plan.sizes)
    stays = not wrapped and (plan.sizes.dp == 1 or summed_there)
    accumulates = micro_batches(cfg, plan.sizes) > 1
    # Of a tied weight the sum with the embedding's is the gradient.
    is_tied = sum(p is weight for _, p in model.named_parameters(remove_duplicate=False)) > 1
    is_parameters_own = stays and not (masters or accumulates or is_tied)
    if cfg.parallel.gradient_accumulation_fusion or is_parameters_own:
        return 0
    made = math.prod(tp_local_shape("output.weight", model, plan)) * element
    # Added to by the next micro-batch, and no gradient in the end, where the sum over replicas takes its place.
    is_replaced = accumulates and not (stays or masters or wrapped or is_tied)
    return 2 * made if is_replaced else made


def _llama2_activation_bytes(
    model: Llama2, plan: Plan, cfg: Config, element: int, device: str
) -> float | None:
    """Bytes per token of each block and the last norm, without the logits."""
    t = plan.sizes.tp
    # Sequence parallelism splits what lies between matmuls.
    residual = 1 / t if plan.partial_grads(model) else 1.0
    block, h = model.layers[0], model.dim
    assert isinstance(block, Block)
    if device == "cuda" and element == 8:
        return None  # attention in float64 is torch's plain one there, which keeps s x s probabilities
    norm = _norm_bytes(h, element, device) * residual + h * element  # its output is gathered for the matmuls
    attention, f = _attention_bytes(block, element, device), block.feed_forward.w1.out_features
    mode, compiled = cfg.parallel.activation_checkpointing, cfg.parallel.compile
    if t > 1 and (compiled or mode is Checkpointing.selective):
        return None  # results of collectives are kept too, by rules that cannot be read from the plan
    # A compiled block keeps what the min-cut partitioner chooses: what is fused is computed again.
    if mode is Checkpointing.full:
        each = h * element * residual
    elif mode is Checkpointing.selective:
        each = _attention_bytes(block, element) + 2 * (h + f) * element  # keys that are repeated are so again
    else:
        each = 2 * norm + (attention + 4 * f * element) / t
        if compiled:
            # The sines of each position are kept once for all rows.
            sines = block.attention.head_dim * max(element, 4) / micro_batch_size(cfg, plan.sizes)
            each = attention + (4 * h + 3 * f) * element + 2 * max(element, 4) + sines
    return model.n_layers * each + norm


def _attention_bytes(block: Block, element: int, device: str = "cpu") -> int:
    """Bytes per token that attention keeps: queries, keys, values, its result, and a log-sum-exp for each head."""
    a = block.attention
    heads = a.wq.out_features // a.head_dim
    keys = a.wq.out_features if device == "cuda" and element == 4 else a.wk.out_features  # repeated there
    return (2 * a.wq.out_features + 2 * keys) * element + heads * max(element, 4)


def _norm_bytes(h: int, element: int, device: str) -> int:
    """What RMSNorm keeps per token besides its output: its input and its scale, and on a CPU the normalised input,
    in at least float32."""
    wide = max(element, 4)
    return h * element + wide if device == "cuda" else 2 * h * wide + wide


def _toy_activation_bytes(model: ToyLM, plan: Plan, element: int) -> float:
    """Bytes per token: the inputs of the three matmuls (ReLU keeps its output, which is the second's input)."""
    t = plan.sizes.tp
    hidden = model.mlp.in_proj.out_features / t
    return (model.embed.embedding_dim + hidden + model.output.in_features) * element
