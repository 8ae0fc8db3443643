"""The loss on held-out rows: the same rows and the same number for every plan."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.data import AnyCorpus, eval_batches
from tpresearch.parallel.apply import fsdp_modules
from tpresearch.parallel.mesh import DATA_AXES, data_rank, sum_over
from tpresearch.train.loss import IGNORED, loss_context, summed_cross_entropy


def held_out_loss(
    model: nn.Module,
    corpus: AnyCorpus,
    count: int,
    micro: int,
    mesh: DeviceMesh,
    vocab_parallel: bool,
    device: torch.device,
    stops: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean cross-entropy, in nats a token, over `count` held-out rows; None where there are none, or all ranks stop.

    Args:
        micro: rows a data-parallel rank takes at once.
        vocab_parallel: the logits come sharded over the vocabulary.
        stops: asked after each batch whether all ranks stop here.
    """
    dp = mesh["dp_replicate"].size() * mesh["dp_shard"].size()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    stopped = False
    model.eval()
    with torch.no_grad(), loss_context(vocab_parallel):
        for rows, counting in eval_batches(corpus.held_out, count, micro, data_rank(mesh), dp):
            rows = rows.to(device)
            targets = rows[:, 1:].clone()
            targets[counting:] = IGNORED
            sums[0] += summed_cross_entropy(model(rows[:, :-1]), targets)
            sums[1] += counting * targets.shape[1]
            if stopped := stops():
                break
    model.train()
    for module in fsdp_modules(model):
        module.reshard()  # the root, for one, stays gathered after a forward that no backward follows
    total, tokens = sum_over(mesh, sums, DATA_AXES).tolist()
    return total / tokens if tokens and not stopped else None
