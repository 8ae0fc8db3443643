"""A device that is out of memory: one sentence, with a command that takes less of it for the same training."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager

from tpresearch.config.axes import MeshSizes
from tpresearch.config.choices import Checkpointing
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.config.validate import micro_batch_size
from tpresearch.config.world import World
from tpresearch.launch.logs import IN_FILES_ONLY

log = logging.getLogger(__name__)

SIGNS = "out of memory|allocate memory|_ALLOC_FAILED"
"""Of torch's allocators, CUDA and NCCL, of a CPU's, and of cuBLAS and cuDNN, which find no room where torch's tensors have all."""


@contextmanager
def refusing_out_of_memory(cfg: Config, sizes: MeshSizes, world: World, trains: bool) -> Iterator[None]:
    """Context in which this rank makes its groups and allocates its state, or trains.

    Raises:
        ConfigError: where a device is out of memory. On hosts other than the first, whose torchrun reports its own ranks'
            errors, it remains torch's.
    """
    try:
        yield
    except RuntimeError as error:
        if world.rank >= world.local_size or not re.search(SIGNS, str(error)):
            raise
        log.error("%s", error, extra=IN_FILES_ONLY)
        said = next(line for line in str(error).splitlines() if re.search(SIGNS, line))
        raise out_of_memory(cfg, sizes, said, trains) from None


def out_of_memory(cfg: Config, sizes: MeshSizes, said: str, trains: bool) -> ConfigError:
    """The refusal: fewer rows at a time, then recomputing more, which change no result but by rounding; then another plan.

    Args:
        said: torch's message. trains: whether there is room for the state alone.
    """
    head, free, _ = said.removeprefix("CUDA out of memory. ").partition(" is free")
    why = f"a device is out of memory ({head.replace('. ', ', ')}{free})"
    rows, micro = cfg.train.global_batch_size // sizes.dp, micro_batch_size(cfg, sizes)
    kind, planner = cfg.parallel.activation_checkpointing, "python -m tpresearch.planner shows plans that fit"
    if trains and micro > 1:
        fewer = max(n for n in range(1, micro // 2 + 1) if rows % n == 0)
        legal = f"fewer rows at a time, or parallel.activation_checkpointing=full; {planner}"
        return ConfigError("train.micro_batch_size", micro, why, legal, {"train.micro_batch_size": fewer})
    if trains and kind is not Checkpointing.full:
        fix = {"parallel.activation_checkpointing": "full"}
        return ConfigError("parallel.activation_checkpointing", kind, why, f"full; {planner}", fix)
    legal = f"one that shards more, over more ranks, on devices that nothing else uses; {planner}"
    return ConfigError("parallel", cfg.parallel.name, why, legal, fix={})
