"""DTensor's shape propagation: it runs a new op once on full shapes, which is not part of a step and is not recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

propagating: list[None] = []
"""Not empty while DTensor runs an op on shapes of whole tensors, to learn what comes of it."""


@contextmanager
def propagation_noted() -> Iterator[None]:
    """Within it, `propagating` says so.

    (`ShardingPropagator._propagate_tensor_meta_non_cached`: private, torch 2.11 to 2.14.)
    """
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    original = ShardingPropagator._propagate_tensor_meta_non_cached

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        propagating.append(None)
        try:
            return original(self, *args, **kwargs)
        finally:
            propagating.pop()

    setattr(ShardingPropagator, original.__name__, noted)
    try:
        yield
    finally:
        setattr(ShardingPropagator, original.__name__, original)
