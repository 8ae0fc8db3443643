"""What compiled blocks save for backward: torch.compile's own partitioner, on the real blocks and fake tensors.

Eager code keeps what each op saves. A compiled block keeps a cut through its graph with the fewest bytes, and computes cheap
ops again in backward's kernels (torch/_functorch/partitioners.py, min_cut_rematerialization_partition).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor

from tpresearch.config.axes import MeshSizes
from tpresearch.config.schema import Checkpointing, Config
from tpresearch.config.validate import has_master_weights
from tpresearch.parallel.apply import parallelize, set_activation_budget, wrap_forward
from tpresearch.parallel.float8 import to_float8
from tpresearch.parallel.weights import materialize
from tpresearch.simulate.fake_ranks import FAKE, fake_mesh
from tpresearch.train.preflight import plan_model
from tpresearch.train.state import MasterWeights

ROWS = 2
"""Rows that are run to find what one row saves. (A single row is a special case: no dim has to be gathered beside it.)"""


def saved_bytes_per_row(cfg: Config, sizes: MeshSizes) -> float:
    """Bytes that a compiled block keeps for backward on rank 0, per row of a micro-batch, without its parameters.

    Args:
        cfg: of a model of two blocks.
    """
    eager = dataclasses.replace(
        cfg.parallel, compile=False, async_tp=False, activation_checkpointing=Checkpointing.none
    )
    model, plan = plan_model(cfg, sizes)
    to_float8(model, plan.float8, cfg.train)
    set_activation_budget(cfg.parallel)
    with fake_mesh(sizes) as mesh:
        model = parallelize(model, plan, eager, mesh, cfg.train.dtype)
        blocks = [model.get_submodule(name) for name in plan.blocks]
        saved = [_SavedTensors(block, model, cfg, bool(plan.rules)) for block in blocks]
        torch._dynamo.reset()
        with _without_policy_warning(), FakeTensorMode(allow_non_fake_inputs=True):
            materialize(model, FAKE.torch, lambda _: None)
            if has_master_weights(cfg, sizes):
                MasterWeights(model)  # leaves bfloat16 copies in it
            rows = torch.empty(ROWS, cfg.data.seq_len, dtype=torch.int64)
            model(rows)
        torch._dynamo.reset()
    first, last = (one.bytes_by_storage for one in saved)
    return sum(size for storage, size in last.items() if storage not in first) / ROWS


@contextmanager
def _without_policy_warning() -> Iterator[None]:
    """Suppress dynamo's warning that a checkpoint has a policy, which it accepts."""
    log = logging.getLogger("torch._higher_order_ops.wrap")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class _SavedTensors:
    """A compiled block, and the storages that its forward saves, except those of its parameters and the model's buffers."""

    def __init__(self, block: nn.Module, model: nn.Module, cfg: Config, has_rules: bool) -> None:
        self.bytes_by_storage: dict[int, int] = {}
        self._block, self._model = block, model
        # What overlaps is inductor's affair: this backend has no such option, and keeps the same.
        parallel = dataclasses.replace(cfg.parallel, async_tp=False)
        wrap_forward(block, parallel, has_rules, _partitioning_backend())
        self._forward: Callable[..., Any] = block.forward
        block.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = {_storage(t) for t in (*self._block.parameters(), *self._model.buffers())}

        def note(tensor: Tensor) -> Tensor:
            if _storage(tensor) not in own:
                local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
                self.bytes_by_storage[_storage(tensor)] = local.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            return self._forward(*args, **kwargs)


def _storage(tensor: Tensor) -> int:
    local = tensor._local_tensor if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()._cdata


def _partitioning_backend() -> Any:
    """A backend that partitions graphs as inductor does, and runs them unchanged (private, torch 2.11 to 2.14)."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def identity(graph: Any, _: Any) -> Any:
        return graph

    return aot_autograd(
        fw_compiler=identity,
        bw_compiler=identity,
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )


def with_compiled_blocks(held: Mapping[str, float], more: float, depth: int) -> dict[str, float]:
    """Bytes by moment of a step whose blocks each keep `more` bytes beyond those that were recorded."""
    found = dict(held)
    for name in found:
        moment, _, kind = name.partition("/")
        phase = moment.partition(" ")[2]
        if kind == "activations" and phase in ("forward", "loss", "backward"):
            found[name] += depth * more
        elif kind == "activations" and phase == "backward ends":
            found[name] = max(0.0, found[name] + more)
    return found
