"""Agreement of all ranks at step boundaries, without waiting: to stop, and that a checkpoint is written everywhere."""

from __future__ import annotations

import signal
from collections.abc import Callable

import torch
import torch.distributed as dist

from tpresearch.launch.stop import StopFlag


class AgreedStop:
    """A stop flag that all ranks see at the same point of their program, and the number of checkpoints written by all.

    At each poll a rank starts one all-reduce of both, and reads the result of the poll before: no rank waits for a
    message, and all see the same result. Without a process group, or alone in one, it is the flag itself.

    Args:
        written: how many background checkpoints this rank has written.
    """

    def __init__(self, flag: StopFlag, written: Callable[[], int] = lambda: 0) -> None:
        self._flag, self._written = flag, written
        self.written = 0
        """The minimum over ranks, as of the last poll but one."""
        self._group = dist.group.WORLD if dist.is_initialized() and dist.get_world_size() > 1 else None
        on_cuda = self._group is not None and dist.get_backend() == "nccl"
        self._numbers = torch.zeros(2, dtype=torch.int64, device="cuda" if on_cuda else "cpu")
        self._maximum = dist.AllreduceOptions()
        self._maximum.reduceOp, self._maximum.asyncOp = dist.ReduceOp(dist.ReduceOp.MAX), True
        self._work: dist.Work | None = None
        # Copied on a side stream: on that of the steps, reading it would wait for the next step.
        self._beside = torch.cuda.Stream() if on_cuda else None
        self._copy, self._copied = self._numbers, torch.cuda.Event() if on_cuda else None

    def poll(self) -> signal.Signals | None:
        """The signal for which all ranks stop here, if they do. Collective: called by all ranks equally often."""
        if self._group is None:
            self.written = self._written()
            return self._flag.requested
        agreed = self.settle()
        # Not `numbers[0] = ...`, which copies from the host, and waits for all that the device has to do.
        self._numbers[0].fill_(self._flag.requested or 0)
        self._numbers[1].fill_(-self._written())
        # Half the time of dist.all_reduce.
        self._work = self._group.allreduce([self._numbers], self._maximum)
        if self._beside and self._copied:
            with torch.cuda.stream(self._beside):
                self._work.wait()
                self._copy = self._numbers.to("cpu", non_blocking=True)
                self._copied.record()
        return agreed

    def settle(self) -> signal.Signals | None:
        """Wait for the last poll's all-reduce, required before the process group is closed; returns its result."""
        if self._work is None:
            return None
        if self._copied:
            self._copied.synchronize()
        else:
            self._work.wait()
        self._work = None
        number, unwritten = self._copy.tolist()
        self.written = -unwritten
        return signal.Signals(number) if number else None
