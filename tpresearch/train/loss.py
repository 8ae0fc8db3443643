"""Next-token cross-entropy, on whole logits or on vocabulary shards."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import loss_parallel

IGNORED = -100
"""A target that counts for nothing: rows that only fill up a batch."""


def loss_context(vocab_parallel: bool) -> AbstractContextManager[None]:
    """Inside it, forward and backward of the cross-entropy work on vocabulary shards (Megatron-LM, section 3)."""
    return loss_parallel() if vocab_parallel else nullcontext()


def summed_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The loss summed over tokens, in nats and at least float32; sharded logits send 3 all-reduces of b*s numbers.

    logits: [b, s, V], plain or a DTensor sharded over V. targets: [b, s] int64, `IGNORED` where there is none.
    Returns: a plain scalar, the same on every tp rank.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(wide.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss.to_local() if isinstance(loss, DTensor) else loss
