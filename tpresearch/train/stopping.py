"""Stopping all ranks after the same step, whichever of them were sent a signal."""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

from tpresearch.launch.stop import StopFlag


class AgreedStop:
    """A stop flag that all ranks see at the same place of their program.

    At each call every rank starts one all-reduce of its flag, and reads what came of the one before: nobody waits for a
    message, and no rank goes on alone. Without a process group, or alone in one, it is the flag itself.
    """

    def __init__(self, flag: StopFlag) -> None:
        self._flag = flag
        self._pending: _Maximum | None = None
        self._alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._beside = torch.cuda.Stream() if not self._alone and dist.get_backend() == "nccl" else None

    def poll(self) -> signal.Signals | None:
        """The signal for which all ranks stop here, if they do. Collective: called by all ranks equally often."""
        if self._alone:
            return self._flag.requested
        agreed = self._pending.read() if self._pending else 0
        self._pending = _Maximum(self._flag.requested or 0, self._beside)
        return signal.Signals(agreed) if agreed else None

    def settle(self) -> None:
        """Wait for what the last poll started, before the process group is closed."""
        if self._pending:
            self._pending.read()
        self._pending = None


class _Maximum:
    """The greatest of a number over all ranks, from an all-reduce that this starts.

    Args:
        beside: with NCCL, a stream for the copy to the host: in the stream of the steps it would wait for the next one.
    """

    def __init__(self, number: int, beside: torch.cuda.Stream | None) -> None:
        self._reduced = torch.full((), number, dtype=torch.int64, device=beside.device if beside else "cpu")
        self._work = dist.all_reduce(self._reduced, dist.ReduceOp.MAX, async_op=True)
        self._copy: tuple[torch.Tensor, torch.cuda.Event] | None = None
        if beside:
            with torch.cuda.stream(beside):
                self._work.wait()
                self._copy = self._reduced.to("cpu", non_blocking=True), beside.record_event()

    def read(self) -> int:
        if self._copy is None:
            self._work.wait()
            return int(self._reduced.item())
        value, copied = self._copy
        copied.synchronize()
        return int(value.item())
