"""What one optimizer step sends: every collective of this rank, by mesh axis and phase, in bytes.

A dispatch mode sees each collective as it is issued, whether by DTensor (functional collectives) or by FSDP
and the step itself (c10d's own): which of the two tells the issuer. Compiled blocks stay compiled under it, and it
sees the collectives that inductor's code issues.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpresearch.config.axes import LAYER_AXES
from tpresearch.ledger.entries import ISSUING_PHASES, Event

# op name, without a variant's suffix -> collective; the full tensor is a gather's result, and any other's input
_FUNCTIONAL = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
    "broadcast": "broadcast",
}
_VARIANT_SUFFIX = re.compile(r"(_coalesced|_out)?_?$")
# Async TP's fused matmuls -> collective; a gather's input, and a scatter's result, is a rank's part of the full tensor
_FUSED_MATMULS = {
    "fused_all_gather_matmul": "all_gather",
    "fused_all_gather_scaled_matmul": "all_gather",
    "fused_matmul_reduce_scatter": "reduce_scatter",
    "fused_scaled_matmul_reduce_scatter": "reduce_scatter",
}
# c10d op name -> (collective, position of the argument that holds the whole); what is received, by `recv_`, counts where it is sent
_C10D = {
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "allreduce_": ("all_reduce", 0),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "send": ("send", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
}
# The same of those of which one rank alone has the whole: the position of a rank's part
_C10D_PARTS = {"gather_": ("gather", 1), "scatter_": ("scatter", 0)}


class CommunicationLedger(TorchDispatchMode):
    """Records collectives while entered; `phase` names the part of the step.

    ledger = CommunicationLedger(mesh)
    with ledger:
        with ledger.phase("forward"):
            ...
    entries_of(ledger.events)
    """

    supports_higher_order_operators = True
    """Compiled blocks call some, to bring random states back for what checkpointing computes again."""

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__()
        names = mesh.mesh_dim_names or ()
        self._groups = {str(mesh.get_group(axis).group_name): (axis, mesh[axis].size()) for axis in names}
        self._phase = "other"
        self.events: list[Event] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Dynamo would otherwise run each compiled function eagerly under this mode, and mark it to do so
        from then on (private; seen in torch 2.11, 2.13 and 2.14)."""
        return True

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        before, self._phase = self._phase, phase
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # let DTensor turn the op into local ones and collectives, which come here again
        result = func(*args, **(kwargs or {}))
        if func.namespace not in ("_c10d_functional", "c10d", "symm_mem"):
            return result
        name = func._schema.name.split("::")[-1]
        if func.namespace == "c10d" and name in _C10D:
            collective, position = _C10D[name]
            self._add_event(collective, args[position], _group_of(args), "fsdp")
        elif func.namespace == "c10d" and name in _C10D_PARTS:
            collective, position = _C10D_PARTS[name]
            self._add_event(collective, args[position], _group_of(args), "fsdp", parts=True)
        elif func.namespace == "symm_mem" and (fused := _FUSED_MATMULS.get(name)):
            group = [argument.name for argument in func._schema.arguments].index("group_name")
            part = args[0] if fused == "all_gather" else result
            self._add_event(fused, part, str(args[group]), "dtensor", parts=True)
        elif func.namespace == "_c10d_functional" and (
            plain := _FUNCTIONAL.get(_VARIANT_SUFFIX.sub("", name))
        ):
            self._add_event(plain, result if plain == "all_gather" else args[0], str(args[-1]), "dtensor")
        return result

    def _add_event(self, collective: str, tensors: Any, group: str, issuer: str, parts: bool = False) -> None:
        """Record one collective.

        Args:
            tensors: the full tensors, or a rank's `parts` of them.
        """
        axis, ranks = self._groups.get(group, ("world", dist.get_world_size()))
        if ranks == 1:
            return
        tensor_bytes = sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, Tensor))
        if parts:
            tensor_bytes *= ranks
        if self._phase in ISSUING_PHASES:
            issuer = self._phase
        elif issuer == "fsdp" and axis in LAYER_AXES:
            issuer = "step"
        self.events.append(Event(axis, self._phase, issuer, collective, tensor_bytes, ranks))


def _group_of(args: tuple[Any, ...]) -> str:
    """The name of the process group that a c10d op was given, as the first of its boxed script objects."""
    group, *_ = (argument for argument in args if isinstance(argument, torch.ScriptObject))
    return str(dist.ProcessGroup.unbox(group).group_name)
