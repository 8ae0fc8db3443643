"""The loss on held-out rows: the same rows and the same number for every plan."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.data import IGNORED, AnyCorpus, eval_batches
from tpresearch.parallel.apply import fsdp_modules
from tpresearch.parallel.mesh import DATA_AXES, data_rank, sum_over
from tpresearch.train.loss import loss_context, summed_cross_entropy


def held_out_loss(
    model: nn.Module,
    corpus: AnyCorpus,
    count: int,
    micro: int,
    mesh: DeviceMesh,
    vocab_parallel: bool,
    device: torch.device,
) -> float | None:
    """Mean cross-entropy, in nats a token, over `count` held-out rows; None where there are none.

    Args:
        micro: rows a data-parallel rank takes at once.
        vocab_parallel: the logits come sharded over the vocabulary.
    """
    dp = mesh["dp_replicate"].size() * mesh["dp_shard"].size()
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    with torch.no_grad(), loss_context(vocab_parallel):
        for batch in eval_batches(corpus.held_out, count, micro, data_rank(mesh), dp):
            inputs, targets = batch.to(device)
            sums[0] += summed_cross_entropy(model(inputs), targets)
            sums[1] += (targets != IGNORED).sum()
    model.train()
    for module in fsdp_modules(model):
        module.reshard()  # the root, for one, stays gathered after a forward that no backward follows
    total, tokens = sum_over(mesh, sums, DATA_AXES).tolist()
    return total / tokens if tokens else None
