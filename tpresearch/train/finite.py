"""Non-finite losses and gradient norms: recorded at each step, reported at the next logged one."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.config.axes import DATA_AXES
from tpresearch.config.errors import RunFailed
from tpresearch.parallel.mesh import sum_over
from tpresearch.train.step import StepResult

log = logging.getLogger(__name__)

REMEDY = "a lower optimizer.lr, or train.on_nonfinite=skip to leave out such updates"


class NonfiniteError(RunFailed):
    """A loss or gradient norm was not finite, and the run was to stop then."""


class FiniteCheck:
    """Checks losses and norms on the device, since reading them at each step would make the host wait."""

    def __init__(self, device: torch.device) -> None:
        self._first_bad_norm = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad_norms = torch.zeros((), dtype=torch.int64, device=device)
        self._losses_since_logged = torch.zeros((), device=device)

    def record(self, step: int, result: StepResult) -> None:
        """Note whether a step's loss and norm are finite.

        Args:
            step: counted from 1.
        """
        bad = ~torch.isfinite(result.grad_norm)
        self._bad_norms += bad
        self._first_bad_norm = torch.where(bad & (self._first_bad_norm < 0), step, self._first_bad_norm)
        self._losses_since_logged += result.loss

    def global_loss(self, step: int, share: Tensor, mesh: DeviceMesh, stop: bool) -> float:
        """The loss over all ranks. Waits for the device.

        Args:
            step: counted from 1. share: this rank's. stop: whether to raise.

        Raises:
            NonfiniteError: for the first loss or norm that was not finite since the last logged row; on every rank.
        """
        sums = torch.stack([share, self._losses_since_logged.to(share.dtype)])
        loss, since_logged = sum_over(mesh, sums, DATA_AXES).tolist()
        self._losses_since_logged.zero_()
        if stop:
            self._raise_for(step, loss, since_logged)
        return float(loss)

    def skipped(self) -> int:
        """The number of updates that were skipped since the last call, with a warning. Waits for the device."""
        count, first = torch.stack([self._bad_norms, self._first_bad_norm]).tolist()
        if count == 1:
            log.warning("step %d: gradient norm is not finite; its update is skipped", first)
        elif count:
            log.warning(
                "%d gradient norms are not finite since step %d; their updates are skipped", count, first
            )
        self._bad_norms.zero_()
        self._first_bad_norm.fill_(-1)
        return int(count)

    def _raise_for(self, step: int, loss: float, since_logged: float) -> None:
        first = int(self._first_bad_norm.item())
        at = first if first > 0 else step
        if not math.isfinite(loss) and at == step:
            raise NonfiniteError(f"train/loss is {loss} at step {at}; {REMEDY}")
        if not math.isfinite(since_logged):
            before = " or before it" if first < 0 else ""
            raise NonfiniteError(f"train/loss is not finite at step {at}{before}; {REMEDY}")
        if first > 0:
            raise NonfiniteError(f"train/grad_norm is not finite at step {first}; {REMEDY}")
