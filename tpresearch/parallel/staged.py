"""Collectives of ranks that share a card: through host memory, over gloo. For tests of correctness on one GPU, not for speed.

NCCL refuses two ranks on one card, and gloo's own collectives on CUDA tensors crash in a functional all-gather (torch 2.11).
"""

# mypy: disable-error-code="override, assignment, attr-defined"
# torch's own stubs of this class differ from version to version.

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

NAME = "staged"


class StagedGroup(dist.ProcessGroup):
    """Each collective waits for the device, copies to the host, runs there, and copies back: it is done when it returns."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._host = dist.ProcessGroupGloo(store, rank, size, timeout)

    @property
    def group_name(self) -> str:
        """As torch has registered it (private; what its own groups in Python do, seen in torch 2.11 to 2.14)."""
        return str(dist.distributed_c10d._world.pg_names[self])

    def getBackendName(self) -> str:
        return NAME

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._in_place("allreduce", tensors, opts or dist.AllreduceOptions())

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        for tensor in tensors:
            self.allreduce([tensor], opts)
        return _done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any) -> Any:
        return self._in_place("broadcast", tensors, opts)

    def barrier(self, opts: Any = None) -> Any:
        return self._host.barrier(opts or dist.BarrierOptions())

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        for parts, own in zip(outputs, inputs, strict=True):
            there = [torch.empty_like(part, device="cpu") for part in parts]
            self._host.allgather([there], [_on_host(own)]).wait()
            _copy(there, parts)
        return _done(outputs)

    def _allgather_base(self, output: Tensor, own: Tensor, opts: Any = None) -> Any:
        return self.allgather([list(output.view(self.size(), -1).unbind())], [own.reshape(-1)], opts)

    def allgather_into_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Any:
        for output, own in zip(outputs, inputs, strict=True):
            self._allgather_base(output, own, opts)
        return _done(outputs)

    def _reduce_scatter_base(self, output: Tensor, whole: Tensor, opts: Any = None) -> Any:
        there, sums = _on_host(whole), dist.AllreduceOptions()
        sums.reduceOp = opts.reduceOp if opts else dist.ReduceOp.SUM
        self._host.allreduce([there], sums).wait()
        _copy([there.view(self.size(), *output.shape)[self.rank()]], [output])
        return _done([output])

    def reduce_scatter(self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None) -> Any:
        for output, parts in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, torch.stack(parts), opts)
        return _done(outputs)

    def reduce_scatter_tensor_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Any:
        for output, whole in zip(outputs, inputs, strict=True):
            self._reduce_scatter_base(output, whole, opts)
        return _done(outputs)

    def alltoall_base(
        self, output: Tensor, given: Tensor, output_sizes: list[int], input_sizes: list[int], opts: Any = None
    ) -> Any:
        there = torch.empty_like(output, device="cpu")
        self._host.alltoall_base(there, _on_host(given), output_sizes, input_sizes).wait()
        _copy([there], [output])
        return _done([output])

    # As torch calls them from 2.13 on.
    all_gather_single, all_gather_single_coalesced = _allgather_base, allgather_into_tensor_coalesced
    reduce_scatter_single, reduce_scatter_single_coalesced = (
        _reduce_scatter_base,
        reduce_scatter_tensor_coalesced,
    )
    all_to_all_single = alltoall_base

    def _in_place(self, collective: str, tensors: list[Tensor], opts: Any) -> Any:
        there = [_on_host(tensor) for tensor in tensors]
        getattr(self._host, collective)(there, opts).wait()
        _copy(there, tensors)
        return _done(tensors)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


@torch.no_grad()
def _copy(found: list[Tensor], into: list[Tensor]) -> None:
    for source, target in zip(found, into, strict=True):
        target.detach().copy_(source)


def _done(result: Any) -> Any:
    """What a collective returns that has ended. (`_create_work_from_future` is private; seen in torch 2.11 to 2.14.)"""
    from torch._C._distributed_c10d import _create_work_from_future

    future: Any = torch.futures.Future()
    future.set_result(result)
    return _create_work_from_future(future)


def register() -> None:
    """Make `NAME` a backend that process groups can be asked for; a second time does nothing."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, StagedGroup, devices=["cpu", "cuda"])
