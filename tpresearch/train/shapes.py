"""A forward that fits the whole model, and not a rank's shards of it, or mixes dtypes: one sentence, with the line of the model's code."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from tpresearch.config.errors import NO_PLACE, ConfigError, WrongModel, one_line, place_of
from tpresearch.launch.logs import IN_FILES_ONLY
from tpresearch.plan.compiler import Plan
from tpresearch.plan.one_rank import does_not_fit
from tpresearch.plan.wrong_on_shards import LOCAL_INPUT

log = logging.getLogger(__name__)

IN_PLACE = "is a view and is being modified inplace"
"""Of what a layer under a rule returns: torch's conversion from a sharded tensor is a view."""

MIXED = "mixed torch.Tensor and DTensor"

SIGNS = (
    "invalid for input of size|cannot be multiplied|reduction dim|must match|normalized_shape|"
    f"{MIXED}|Sharding propagation failed|{IN_PLACE}"
)
"""Of torch's errors where the sizes of tensors do not fit each other, or one is sharded and the other is not."""

NO_SHARDS = r"loss_parallel\(\) (requires exactly one mesh dim|should be enabled only)"
"""Of torch's loss on vocabulary shards, where logits have none: as torch 2.13 says it, and 2.11."""

NO_STRATEGY = r"Operator (\S+) does not have a sharding strategy"
"""Of an op on a sharded tensor, of which logits are the only one that a forward meets under the styles of torch."""

DTYPES = "same dtype|match weight dtype|scalar type|type .* should be the same"
"""Of those where the dtypes of tensors do not."""


NO_KERNEL = r"(Unsupported dtype|not implemented for|not supported|only supported for|Expected both inputs to be).*BFloat16"
"""Of ops that torch lacks in bfloat16, as Fourier transforms and decompositions of matrices."""


@contextmanager
def refusing_shapes(model: str, plan: Plan) -> Iterator[None]:
    """Context in which a model is trained under its sharding rules. It ran whole before, on the meta device and in float32: where
    sizes do not fit here, the rules or what the forward takes for granted are the cause, and where dtypes do not, or have no kernel,
    train.dtype is.

    Raises:
        WrongModel: with the line of its code.
    """
    try:
        yield
    except (RuntimeError, ValueError) as error:
        place = place_of(error)
        if place != NO_PLACE and re.search(NO_KERNEL, one_line(error)):
            log.exception("torch's error", extra=IN_FILES_ONLY)
            legal = "train.dtype=float32, or a forward that computes this op on numbers in float32, as x.float() is"
            raise WrongModel(model, f"it ends at {place}: {one_line(error)}", legal) from None
        if place != NO_PLACE and re.search(DTYPES, str(error)):
            log.exception("torch's error", extra=IN_FILES_ONLY)
            legal = "a forward that mixes no dtypes: with train.dtype=bfloat16 weights are bfloat16 in it, and buffers what they were"
            raise WrongModel(model, f"it ends at {place}: {one_line(error)}", legal) from None
        if plan.loss_parallel and (why := _why_not_on_shards(str(error))):
            log.exception("torch's error", extra=IN_FILES_ONLY)
            fix = {"parallel.loss_parallel": "false"}
            raise ConfigError("parallel.loss_parallel", True, why, "false", fix) from None
        if not plan.rules or plan.probe.output is None or not re.search(SIGNS, str(error)):
            raise
        log.exception("torch's error", extra=IN_FILES_ONLY)
        refused = does_not_fit(model, error)
        if IN_PLACE in str(error):
            legal = "no op in place on what a layer under a sharding rule has returned: x = x + y for x += y, nn.ReLU() for nn.ReLU(True)"
            refused = WrongModel(model, refused.why, legal)
        elif MIXED in str(error):
            refused = WrongModel(model, refused.why, LOCAL_INPUT)
        raise refused from None


def _why_not_on_shards(said: str) -> str | None:
    if re.search(NO_SHARDS, said):
        return "what the forward does to the logits leaves no shards of the vocabulary, on which the loss would be computed"
    if op := re.search(NO_STRATEGY, said):
        return (
            f"torch cannot compute {op[1]} on shards of the vocabulary, as which the forward has the logits"
        )
    return None
