"""The training loop of one rank: steps, a row of metrics for each logged one, and the loss on held-out rows."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from signal import Signals

import torch
from torch import nn

from tpresearch.checkpoint.save import Saver
from tpresearch.config.axes import DATA_AXES
from tpresearch.config.choices import OnNonfinite
from tpresearch.data.batches import IGNORE_INDEX, Batch, Batches, eval_batches
from tpresearch.data.rows import AnyCorpus
from tpresearch.parallel.apply import reshard
from tpresearch.parallel.mesh import data_rank, sum_over
from tpresearch.train.finite import FiniteCheck, NonfiniteError
from tpresearch.train.losses import build_token_loss
from tpresearch.train.observe import Metrics
from tpresearch.train.optim import learning_rate
from tpresearch.train.state import TrainState
from tpresearch.train.step import Setup, StepResult, train_step
from tpresearch.train.stopping import AgreedStop

COLLECT_EVERY = 100
"""Steps between Python's garbage collections, which would otherwise stall one rank at a time at arbitrary points."""


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode; afterwards, also of an evaluation that is interrupted in a notebook, as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train()
        for module, training in modes:  # parts of it may always be in evaluation mode
            module.training = training
        reshard(model)


@dataclass
class Loop:
    """A run on one rank, ready for its next step."""

    state: TrainState
    setup: Setup
    corpus: AnyCorpus
    batches: Batches
    stop: AgreedStop | None = None
    """Asked after each step, and between the batches of an evaluation, whether all ranks stop."""
    saver: Saver | None = None
    """Saves the state at the configured steps and after the last one, also after a signal."""
    stopped_by: Signals | None = None
    """The signal for which all ranks stopped."""

    def read(self) -> Batch:
        """This rank's rows of the next global batch, on its device."""
        setup = self.setup
        batch = self.batches.batch(self.state.step, data_rank(setup.mesh), setup.plan.sizes.dp)
        return batch.to(setup.device.torch, setup.input_dtype)

    def step(self) -> StepResult:
        """One optimizer step on the next global batch."""
        with self.setup.observers.phase("data"):
            batch = self.read()
        return train_step(self.state, batch, self.setup)

    def evaluates_at(self, step: int) -> bool:
        every = self.setup.cfg.train.eval_every
        return step == self.setup.steps or (every is not None and step % every == 0)

    def evaluate(self) -> float | None:
        """The loss on held-out rows, the same rows and the same number for every plan: the mean cross-entropy, in nats per
        token, over `train.eval_rows` of them; None if there are none, or all ranks stop."""
        with self.setup.observers.phase("evaluation"):
            return self._held_out_loss()

    def _held_out_loss(self) -> float | None:
        if not (self.setup.cfg.train.eval_rows and len(self.corpus.held_out)):
            return None
        setup, model, stopped = self.setup, self.state.model, False
        mesh, device, count = setup.mesh, setup.device.torch, setup.cfg.train.eval_rows
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        token_loss = build_token_loss(setup.cfg, setup.plan)
        eagerly = torch.compiler.set_stance  # else each block is compiled once more, without gradients
        with _evaluating(model), eagerly("force_eager"), torch.no_grad(), token_loss.context():
            shares = setup.micro_rows, data_rank(mesh), setup.plan.sizes.dp
            for batch in eval_batches(self.corpus.held_out, count, *shares):
                here = batch.to(device)
                sums[0] += token_loss(model, here, lambda _: nullcontext())
                sums[1] += (here.targets != IGNORE_INDEX).sum()
                if stopped := self.stops():
                    break
        total, tokens = sum_over(mesh, sums, DATA_AXES).tolist()
        return total / tokens if tokens and not stopped else None

    def stops(self) -> bool:
        """Whether all ranks stop here; collective."""
        if self.stop and self.stopped_by is None:
            self.stopped_by = self.stop.poll()
            if self.saver:
                with self.setup.observers.phase("pause"):
                    self.saver.commit_written(self.stop.written)
        return self.stopped_by is not None

    def rows(self) -> Iterator[Metrics]:
        """Take all steps that are left, or those up to a stop; yield the metrics of each logged one, and of the last."""
        gc.collect()
        gc.disable()
        try:
            yield from self._rows()
        except NonfiniteError:  # on every rank
            if self.saver:
                self.saver.finish()
            raise
        finally:
            gc.unfreeze()
            gc.enable()

    def _rows(self) -> Iterator[Metrics]:
        state, setup, train = self.state, self.setup, self.setup.cfg.train
        finite, taken = FiniteCheck(setup.device.torch), 0
        while state.step < setup.steps and self.stopped_by is None:
            result = self.step()
            finite.record(state.step, result)
            stops, last = self.stops(), state.step == setup.steps
            evaluates = self.evaluates_at(state.step) and not stops
            due = self.saver is not None and self.saver.is_due(state.step)
            loss = None
            if evaluates or due or stops or state.step % train.log_every == 0:
                row = self._row(result, finite)
                loss = row["train/loss"]
                if evaluates:
                    row["val/loss"] = self.evaluate()
                yield row
            ends = last or self.stopped_by is not None
            if self.saver and (due or ends):  # after the row, which is never behind the checkpoint
                with setup.observers.phase("pause"):
                    self.saver.save(state, state.step * setup.tokens_per_step, loss, last=ends)
            taken += 1
            if taken == 2 or state.step % COLLECT_EVERY == 0:
                with setup.observers.phase("pause"):
                    gc.collect()
                    if taken == 2:
                        gc.freeze()  # all that stays is there: no later collection goes through it again
        if self.stop:
            self.stop.settle()

    def _row(self, result: StepResult, finite: FiniteCheck) -> Metrics:
        """A logged row. But for evaluating and offloading, only here does the host wait for the device."""
        step, setup, cfg = self.state.step, self.setup, self.setup.cfg
        stops = cfg.train.on_nonfinite is OnNonfinite.stop
        skipped = None if stops else finite.skipped()
        return {
            "train/step": step,
            "train/tokens": step * setup.tokens_per_step,
            "train/loss": finite.global_loss(step, result.loss, setup.mesh, stops),  # waits for the device
            "train/grad_norm": result.grad_norm.item(),
            "train/lr": learning_rate(step - 1, setup.steps, cfg.optimizer.lr, cfg.schedule),
            "train/skipped_updates": skipped,
            **setup.observers.metrics(),
        }
