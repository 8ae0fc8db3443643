"""What compiled blocks save for backward and compute again: torch.compile's own partitioner, on the real blocks and fake tensors.

Eager code keeps what each op saves. A compiled block keeps a cut through its graph with the fewest bytes, and computes cheap
ops again in backward's kernels (torch/_functorch/partitioners.py, min_cut_rematerialization_partition); within a budget also
matmuls, attention and collectives.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tpresearch.config.axes import MeshSizes
from tpresearch.config.schema import Checkpointing, Config
from tpresearch.config.validate import has_master_weights
from tpresearch.data.batches import meta_batch
from tpresearch.parallel.apply import parallelize, set_activation_budget, wrap_forward
from tpresearch.parallel.device import FAKE
from tpresearch.parallel.float8 import to_float8
from tpresearch.parallel.kept import save_slow_ops
from tpresearch.parallel.weights import materialize
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.simulate.device_memory import MICRO_BATCH
from tpresearch.simulate.fake_ranks import fake_mesh
from tpresearch.train.preflight import plan_model
from tpresearch.train.state import MasterWeights

ROWS = 2
"""Rows that are run to find what one row saves. (A single row is a special case: no dim has to be gathered beside it.)"""

Call = tuple[Any, int]
"""(op, how often it was called before in a block's forward)."""


class CompiledBlock(NamedTuple):
    """The last block of a model, as compiled."""

    saved_bytes_per_row: float
    """Bytes that it keeps for backward on rank 0, per row of a micro-batch, without its parameters and what earlier blocks
    keep too."""
    recomputed: frozenset[Call]
    """Calls of forward that backward repeats."""


def compiled_block(cfg: Config, sizes: MeshSizes) -> CompiledBlock:
    """Compile a model's blocks at `ROWS` rows, without running anything.

    Args:
        cfg: of a model of two blocks, if the bytes are to be those of one block among many.
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
        compiled = [_Compiled(block, model, cfg, bool(plan.rules)) for block in blocks]
        torch._dynamo.reset()
        with _attention_as_on(cfg), FakeTensorMode(allow_non_fake_inputs=True):
            materialize(model, FAKE.torch, lambda _: None)
            if has_master_weights(cfg, sizes):
                MasterWeights(model)  # leaves bfloat16 copies in it
            rows = meta_batch(cfg.data, ROWS).to(torch.device("meta"), getattr(torch, cfg.train.dtype))
            model(torch.empty_like(rows.inputs, device=FAKE.torch))
        torch._dynamo.reset()
    *earlier, last = compiled
    shared = {storage for one in earlier for storage in one.bytes_by_storage}
    saved = sum(size for storage, size in last.bytes_by_storage.items() if storage not in shared)
    return CompiledBlock(saved / ROWS, frozenset(last.recomputed))


def recompute(forward: Callable[..., Any], calls: frozenset[Call]) -> Callable[..., Any]:
    """An eager block under a checkpoint that keeps of the slow ops all but some calls, and of the others none."""

    def contexts() -> Any:
        counts: dict[bool, Counter[Any]] = {False: Counter(), True: Counter()}

        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            count = counts[context.is_recompute]
            call = op, count[op]
            count[op] += 1
            return CheckpointPolicy.PREFER_RECOMPUTE if call in calls else save_slow_ops(context, op)

        return create_selective_checkpoint_contexts(policy)

    return functools.partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


@contextmanager
def _attention_as_on(cfg: Config) -> Iterator[None]:
    """For a cluster of GPUs, let the partitioner count the attention of fake tensors, which are on a CPU, as it counts that of a
    GPU: a CPU's op is free to it (private; read in torch 2.11 to 2.14).
    """
    from torch._functorch import partitioners
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    op = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    if op in flop_registry or (cfg.cluster and parse_cluster(cfg.cluster).is_cpu):
        yield
        return
    known = partitioners.get_default_op_list

    def with_attention() -> Any:
        found = known()
        slow = found.compute_intensive_ops
        return dataclasses.replace(found, compute_intensive_ops=type(slow)([*slow, op]))

    register_flop_formula(op)(_attention_flops)
    try:
        with patch.object(partitioners, "get_default_op_list", with_attention):
            yield
    finally:
        del flop_registry[op]


def _attention_flops(query: Any, key: Any, *_: Any, **__: Any) -> int:
    """Of shapes (rows, heads, length, width): two matmuls."""
    rows, heads, length, width = query
    return int(4 * rows * heads * length * key[2] * width)


class _Compiled:
    """A compiled block, the storages that its forward saves, except those of its parameters and the model's buffers, and the
    calls that its backward repeats."""

    def __init__(self, block: nn.Module, model: nn.Module, cfg: Config, has_rules: bool) -> None:
        self.bytes_by_storage: dict[torch.UntypedStorage, int] = {}
        self.recomputed: set[Call] = set()
        self._block, self._model = block, model
        # What overlaps is inductor's affair: this backend has no such option, and keeps the same.
        parallel = dataclasses.replace(cfg.parallel, async_tp=False)
        wrap_forward(block, parallel, has_rules, _partitioning_backend(self.recomputed))
        self._forward: Callable[..., Any] = block.forward
        block.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = {_storage(t) for t in (*self._block.parameters(), *self._model.buffers())}

        def note(tensor: Tensor) -> Tensor:
            if (storage := _storage(tensor)) not in own:
                self.bytes_by_storage[storage] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            return self._forward(*args, **kwargs)


def _storage(tensor: Tensor) -> torch.UntypedStorage:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage()


def _partitioning_backend(recomputed: set[Call]) -> Any:
    """A backend that partitions graphs as inductor does, and runs them unchanged (private, torch 2.11 to 2.14).

    Args:
        recomputed: where it adds the calls of forward that are in the graph of backward too, under the same name.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table

    def identity(graph: Any, _: Any) -> Any:
        return graph

    def partition(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        graphs = min_cut_rematerialization_partition(*args, **kwargs)
        forward, backward = ([n for n in g.graph.nodes if n.op == "call_function"] for g in graphs)
        again, counts = {node.name for node in backward}, Counter[Any]()
        for node in forward:
            if node.name in again:
                recomputed.add((node.target, counts[node.target]))
            counts[node.target] += 1
        return graphs

    return aot_autograd(
        fw_compiler=identity,
        bw_compiler=identity,
        partition_fn=partition,
        decompositions=select_decomp_table(),
    )


def with_compiled_blocks(held: Mapping[str, float], more: float, depth: int) -> dict[str, float]:
    """Bytes by moment of a step whose blocks each keep `more` bytes beyond those that were recorded."""
    found = dict(held)
    for name in found:
        moment, _, kind = name.partition("/")
        number, _, phase = moment.partition(" ")
        # What sums gradients at the end of a step is called backward too, and then no block keeps anything.
        if kind == "activations" and phase == MICRO_BATCH[int(number) % len(MICRO_BATCH)]:
            found[name] += depth * more
        elif kind == "activations" and phase == "backward ends":
            found[name] = max(0.0, found[name] + more)
    return found
