"""The loss on held-out rows: the same rows and the same number for every plan."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from numpy.typing import NDArray
from torch import nn

from tpresearch.config.axes import DATA_AXES
from tpresearch.data.batches import IGNORED, eval_batches
from tpresearch.parallel.apply import reshard
from tpresearch.parallel.mesh import data_rank, sum_over
from tpresearch.train.losses import token_loss_of
from tpresearch.train.step import Setup


def held_out_loss(
    model: nn.Module, rows: NDArray[Any], setup: Setup, stops: Callable[[], bool] = lambda: False
) -> float | None:
    """Mean cross-entropy, in nats per token, over `train.eval_rows` of the held-out rows; None if there are none.

    Args:
        stops: asked after each batch whether all ranks stop here; the loss is None then.
    """
    mesh, device, count = setup.mesh, setup.device.torch, setup.cfg.train.eval_rows
    stopped = False
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    eagerly = torch.compiler.set_stance  # else each block is compiled once more, without gradients
    token_loss = token_loss_of(setup.cfg, setup.plan)
    with eagerly("force_eager"), torch.no_grad(), token_loss.context():
        for batch in eval_batches(rows, count, setup.micro_rows, data_rank(mesh), setup.plan.sizes.dp):
            here = batch.to(device)
            sums[0] += token_loss(model, here, lambda _: nullcontext())
            sums[1] += (here.targets != IGNORED).sum()
            if stopped := stops():
                break
    model.train()
    reshard(model)
    total, tokens = sum_over(mesh, sums, DATA_AXES).tolist()
    return total / tokens if tokens and not stopped else None
