"""Stopping all ranks after the same step, whichever of them were sent a signal."""

from __future__ import annotations

import signal

import torch
import torch.distributed as dist

from tpresearch.launch.stop import StopFlag


class AgreedStop:
    """A stop flag that all ranks see at the same place of their program.

    At each poll a rank starts one all-reduce of its flag, and reads what came of the poll before: no rank waits for a
    message, and none goes on alone. Without a process group, or alone in one, it is the flag itself.
    """

    def __init__(self, flag: StopFlag) -> None:
        self._flag = flag
        self._group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
        on_cuda = self._group is not None and dist.get_backend() == "nccl"
        self._number = torch.zeros(1, dtype=torch.int64, device="cuda" if on_cuda else "cpu")
        self._maximum = dist.AllreduceOptions()
        self._maximum.reduceOp, self._maximum.asyncOp = dist.ReduceOp(dist.ReduceOp.MAX), True
        self._work: dist.Work | None = None
        # Copied beside the stream of the steps, in which reading it would wait for the next one.
        self._beside = torch.cuda.Stream() if on_cuda else None
        self._copy, self._copied = self._number, torch.cuda.Event() if on_cuda else None

    def poll(self) -> signal.Signals | None:
        """The signal for which all ranks stop here, if they do. Collective: called by all ranks equally often."""
        if self._group is None:
            return self._flag.requested
        agreed = self.settle()
        self._number.fill_(self._flag.requested or 0)
        self._work = self._group.allreduce(
            [self._number], self._maximum
        )  # dist.all_reduce takes twice as long
        if self._beside and self._copied:
            with torch.cuda.stream(self._beside):
                self._work.wait()
                self._copy = self._number.to("cpu", non_blocking=True)
                self._copied.record()
        return agreed

    def settle(self) -> signal.Signals | None:
        """Wait for what the last poll started, as is due before the process group is closed; returns what came of it."""
        if self._work is None:
            return None
        if self._copied:
            self._copied.synchronize()
        else:
            self._work.wait()
        self._work = None
        number = int(self._copy.item())
        return signal.Signals(number) if number else None
