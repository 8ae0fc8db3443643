"""The reference for plans: the same training in one process, written as in a notebook, without the framework's step,
sharding, loss or norm. Only initial weights and buffers, batches and learning rates come from the framework.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpresearch.config.choices import Loss, OptimizerName
from tpresearch.config.schema import Config, Dtype
from tpresearch.config.validate import total_steps
from tpresearch.data.batches import Batch, Batches, eval_batches
from tpresearch.data.rows import AnyCorpus
from tpresearch.parallel.weights import fill_buffers
from tpresearch.plan.initializers import read_initializers
from tpresearch.plan.meta import plain_model, weight_dtype
from tpresearch.train.assemble import weight_source
from tpresearch.train.optim import learning_rate
from tpresearch.verify.trace import RunTrace, StepTrace, Tensors


def reference(cfg: Config, corpus: AnyCorpus, steps: int) -> RunTrace:
    """A few steps on the whole global batch at once, on the CPU."""
    model = plain_model(cfg.model, weight_dtype(cfg.train))
    weight_source(cfg, read_initializers(model))(model)
    fill_buffers(model, cfg.train.seed)
    optimizer = _optimizer(model, cfg)
    batches = Batches(corpus, cfg.train.global_batch_size, cfg.train.seed, cfg.data.repeat_batches)
    initial, taken = _copies(dict(model.named_parameters())), []
    for step in range(steps):
        loss = _loss(model, batches.batch(step), cfg)
        loss.backward()
        gradients = _copies({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        # In float64: torch's norm on a CPU is off by 2e-4 for 8 million numbers in float32.
        norm = nn.utils.get_total_norm([p.grad.double() for p in model.parameters() if p.grad is not None])
        if cfg.train.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(model.parameters(), cfg.train.clip_grad_norm, norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, total_steps(cfg), cfg.optimizer.lr, cfg.schedule)
        optimizer.step()
        optimizer.zero_grad()
        weights = _copies(dict(model.named_parameters()))
        held_out = _held_out(model, corpus, cfg)
        taken.append(StepTrace(loss.item(), norm.item(), gradients, weights, held_out))
    return RunTrace(initial, taken)


def _loss(model: nn.Module, batch: Batch, cfg: Config) -> Tensor:
    output = _output(model, batch, cfg)
    return output.sum() if cfg.train.loss is Loss.sum else _cross_entropy(output, batch)


def _output(model: nn.Module, batch: Batch, cfg: Config) -> Tensor:
    inputs = batch.inputs
    if inputs.is_floating_point():
        inputs = inputs.to(getattr(torch, cfg.train.dtype))
    weights: dict[str, Tensor] = dict(model.named_parameters())
    if cfg.train.dtype is Dtype.bfloat16:  # the trained float32 weights are unchanged
        weights = {name: weight.bfloat16() for name, weight in weights.items()}
    output = torch.func.functional_call(model, weights, inputs)
    return output.to(torch.promote_types(output.dtype, torch.float32))


def _cross_entropy(output: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), batch.targets.flatten())


def _optimizer(model: nn.Module, cfg: Config) -> torch.optim.Optimizer:
    ours = cfg.optimizer
    decayed = [p for p in model.parameters() if p.dim() >= 2 or ours.decay_vectors]
    others = [p for p in model.parameters() if p.dim() < 2 and not ours.decay_vectors]
    groups = [{"params": decayed, "weight_decay": ours.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if ours.name is OptimizerName.sgd:
        return torch.optim.SGD(groups, lr=ours.lr, momentum=ours.momentum)
    beta1, beta2 = ours.betas
    return torch.optim.AdamW(groups, lr=ours.lr, betas=(beta1, beta2), eps=ours.eps)


@torch.no_grad()
def _held_out(model: nn.Module, corpus: AnyCorpus, cfg: Config) -> float | None:
    rows = min(cfg.train.eval_rows, len(corpus.held_out))
    if not rows:
        return None
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    (batch,) = eval_batches(corpus.held_out, rows, rows)
    loss = _cross_entropy(_output(model, batch, cfg), batch).item()  # whatever train.loss is
    for module, training in modes:
        module.training = training
    return loss


def _copies(tensors: dict[str, Tensor]) -> Tensors:
    return {name: tensor.detach().to(torch.float64, copy=True) for name, tensor in tensors.items()}
