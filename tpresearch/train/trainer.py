"""The steps of a run on one rank, and what is measured of them."""

from __future__ import annotations

import gc
import logging
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.config.schema import Config, OnNonfinite
from tpresearch.config.validate import total_steps
from tpresearch.data import AnyCorpus, batches_of
from tpresearch.ledger.step import Counted
from tpresearch.parallel.mesh import DATA_AXES, data_rank, sum_over
from tpresearch.plan.compiler import Plan
from tpresearch.train.defects import KeptGradients, part_to_read
from tpresearch.train.device import Device
from tpresearch.train.evaluate import held_out_loss
from tpresearch.train.loss import Objective
from tpresearch.train.optim import build_optimizer, learning_rate, set_learning_rate
from tpresearch.train.speed import peak_flops, peak_memory_bytes
from tpresearch.train.step import Phase, accumulate_gradients, clip_gradients, reduce_partial_gradients
from tpresearch.train.stopping import AgreedStop
from tpresearch.train.timing import PhaseTimes

log = logging.getLogger(__name__)

COLLECT_EVERY = 100
"""Steps between Python's garbage collections, which would otherwise stall one rank at a time, anywhere."""


class NonfiniteError(RuntimeError):
    """A loss or gradient norm was not finite, and the run was to stop then."""


def both(outer: Phase, inner: Phase) -> Phase:
    """One mark that tells two."""

    @contextmanager
    def mark(phase: str) -> Iterator[None]:
        with outer(phase), inner(phase):
            yield

    return mark


@dataclass
class Window:
    """What has passed since the last logged row; evaluation and collection are left out."""

    phases: PhaseTimes
    steps: int = 0
    data_s: float = 0.0
    """On the host's clock, unlike the phases: a GPU may still be at the step before."""
    paused_s: float = 0.0
    began: float = field(default_factory=time.perf_counter)

    @contextmanager
    def pause(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.paused_s += time.perf_counter() - start

    @property
    def step_time_s(self) -> float:
        return (time.perf_counter() - self.began - self.paused_s) / self.steps


class Trainer:
    """The state of a run on one rank, and its steps.

    Args:
        model: sharded by `plan` over `mesh`.
        cost: model FLOPs a token, by whether attention is counted causal.

    Attributes:
        on_gradients: called with the model each step, when its gradients are whole and not yet clipped.
        on_counted: called once, with what an early step sent and held.
        counted: the same, from then on.
        stop: asked after each step, and between the batches of an evaluation, whether all ranks stop.
        stopped_by: the signal for which they did.
    """

    def __init__(
        self,
        cfg: Config,
        model: nn.Module,
        plan: Plan,
        mesh: DeviceMesh,
        device: Device,
        corpus: AnyCorpus,
        cost: dict[bool, float],
    ) -> None:
        self.cfg, self.model, self.mesh, self.device, self.corpus = cfg, model, mesh, device, corpus
        self.plan, self.vocab_parallel, self.cost, self.dp = plan, plan.loss_parallel, cost, plan.sizes.dp
        self.on_gradients: Callable[[nn.Module], None] | None = None
        self.on_counted: Callable[[Counted], None] | None = None
        self.steps = total_steps(cfg)
        self.optimizer = build_optimizer(model, cfg.optimizer)
        self.batches = batches_of(corpus, cfg.train.global_batch_size, cfg.train.seed)
        self.micro = cfg.train.micro_batch_size or cfg.train.global_batch_size // self.dp
        self.tokens_per_step = cfg.train.global_batch_size * cfg.data.seq_len
        dtype = getattr(torch, cfg.train.dtype)
        self.objective = Objective(cfg.train.loss, self.vocab_parallel, self.tokens_per_step, dtype)
        self.kept = KeptGradients(model) if cfg.defects.keep_gradients else None
        self.counted: Counted | None = None
        self.stop: AgreedStop | None = None
        self.stopped_by: signal.Signals | None = None
        # Kept on the device, since asking each step would make the host wait.
        self.first_bad_norm = torch.full((), -1, dtype=torch.int64, device=device.torch)
        self.shares_since_logged = torch.zeros((), device=device.torch)

    def rows(self) -> Iterator[dict[str, float | None]]:
        """Run all steps, or those up to a stop; yield the metrics of each logged one, and of the last in any case."""
        gc.collect()
        gc.disable()
        try:
            yield from self._rows()
        finally:
            gc.enable()

    def _rows(self) -> Iterator[dict[str, float | None]]:
        window = self.window()
        every, last = self.cfg.train.eval_every, self.steps - 1
        for step in range(self.steps):
            counts = step == min(1, last)  # the first step may send what later ones do not
            counted = Counted(self.mesh, self.model, self.optimizer) if counts else None
            loss, norm = self.step(step, window, counted)
            window.steps += 1
            stops = self.stops()
            evaluates = not stops and (step == last or (every is not None and (step + 1) % every == 0))
            if evaluates or stops or (step + 1) % self.cfg.train.log_every == 0:
                row = self.metrics(step, loss, norm, window)
                if evaluates:
                    row["val/loss"] = self.evaluate()
                yield row
                window = self.window()
            if self.stopped_by is not None:
                break
            if (step + 1) % COLLECT_EVERY == 0:
                with window.pause():
                    gc.collect()
        if self.stop:
            self.stop.settle()

    def stops(self) -> bool:
        """Whether all ranks stop here; collective."""
        if self.stop and self.stopped_by is None:
            self.stopped_by = self.stop.poll()
        return self.stopped_by is not None

    def window(self) -> Window:
        return Window(PhaseTimes(self.device.torch))

    def step(self, step: int, window: Window, counted: Counted | None) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step. Returns this rank's share of the loss and the global gradient norm, on the device."""
        start = time.perf_counter()
        rows = self.batches.batch(*part_to_read(self.cfg, step, data_rank(self.mesh)), self.dp)
        if self.device.type == "cuda":
            rows = rows.pin_memory().to(self.device.torch, non_blocking=True)
        window.data_s += time.perf_counter() - start
        mark = both(counted.mark, window.phases.mark) if counted else window.phases.mark
        with counted or nullcontext():
            share = accumulate_gradients(self.model, rows.split(self.micro), self.objective, mark)
            with mark("backward"):
                reduce_partial_gradients(self.model, self.plan, self.mesh)
            if self.kept:
                self.kept.add()
            if counted:
                counted.held.note_gradients()
            if self.on_gradients:
                self.on_gradients(self.model)
            with mark("clip"):
                norm = clip_gradients(self.model, self.mesh, self.cfg.train.clip_grad_norm)
            with mark("optimizer"):
                self.update(step, norm)
        self.shares_since_logged += share
        if counted:
            self.counted = counted
            if self.cfg.parallel.compile and self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()  # the counted step ran eagerly, which takes more
            if self.on_counted:
                self.on_counted(counted)
        return share, norm

    def update(self, step: int, norm: torch.Tensor) -> None:
        """Move the weights, unless the norm is not finite and such an update is to be skipped."""
        bad = ~torch.isfinite(norm) & (self.first_bad_norm < 0)
        self.first_bad_norm = torch.where(bad, step + 1, self.first_bad_norm)
        if self.cfg.train.on_nonfinite is OnNonfinite.skip and not math.isfinite(norm.item()):
            log.warning("step %d: gradient norm is %s; its update is skipped", step + 1, norm.item())
        else:
            lr = learning_rate(step, self.steps, self.cfg.optimizer.lr, self.cfg.schedule)
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
        if self.kept:
            self.kept.keep()
        self.optimizer.zero_grad()

    def metrics(
        self, step: int, share: torch.Tensor, norm: torch.Tensor, window: Window
    ) -> dict[str, float | None]:
        """A logged row. But for evaluating, skipping and offloading, only here does the host wait for the device."""
        sums = torch.stack([share, self.shares_since_logged.to(share.dtype)])
        loss, since_logged = sum_over(self.mesh, sums, DATA_AXES).tolist()
        step_time = window.step_time_s  # after .tolist(): the device has come this far
        self.stop_if_nonfinite(step, loss, since_logged)
        self.shares_since_logged.zero_()
        speed = self.tokens_per_step / step_time
        per_device = speed / dist.get_world_size()
        peak = peak_flops(self.device.name, self.cfg.train.dtype)
        return {
            "train/step": step + 1,
            "train/tokens": (step + 1) * self.tokens_per_step,
            "train/loss": loss,
            "train/grad_norm": norm.item(),
            "train/lr": learning_rate(step, self.steps, self.cfg.optimizer.lr, self.cfg.schedule),
            "perf/step_time_s": step_time,
            "perf/tokens_per_second": speed,
            "perf/tokens_per_second_per_device": per_device,
            "perf/mfu": per_device * self.cost[False] / peak if peak else None,
            "perf/mfu_causal": per_device * self.cost[True] / peak if peak else None,
            "time/data_s": window.data_s / window.steps,
            **{f"time/{phase}_s": s / window.steps for phase, s in window.phases.seconds().items()},
            "memory/peak_bytes": peak_memory_bytes(self.device),
            "comm/bytes_per_step": self.counted.sent.sent_bytes if self.counted else None,
        }

    def stop_if_nonfinite(self, step: int, loss: float, since_logged: float) -> None:
        """Raise for the first loss or norm that was not finite since the last logged row; the same on every rank."""
        if self.cfg.train.on_nonfinite is not OnNonfinite.stop:
            return
        first = int(self.first_bad_norm.item())
        at = first if first > 0 else step + 1
        if not math.isfinite(loss) and at == step + 1:
            raise NonfiniteError(f"train/loss is {loss} at step {at}")
        if not math.isfinite(since_logged):
            raise NonfiniteError(
                f"train/loss is not finite at step {at}" + (" or before it" if first < 0 else "")
            )
        if first > 0:
            raise NonfiniteError(f"train/grad_norm is not finite at step {first}")

    def evaluate(self) -> float | None:
        return held_out_loss(
            self.model,
            self.corpus,
            self.cfg.train.eval_rows,
            self.micro,
            self.mesh,
            self.vocab_parallel,
            self.device.torch,
            self.stops,
        )
