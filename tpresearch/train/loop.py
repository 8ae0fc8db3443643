"""The training loop of one rank: steps, and a row of metrics for each logged one."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import dataclass
from signal import Signals

from tpresearch.checkpoint.save import Saver
from tpresearch.config.choices import OnNonfinite
from tpresearch.data.batches import Batch, Batches
from tpresearch.data.rows import AnyCorpus
from tpresearch.parallel.mesh import data_rank
from tpresearch.train.evaluate import held_out_loss
from tpresearch.train.finite import FiniteCheck
from tpresearch.train.observe import Metrics
from tpresearch.train.optim import learning_rate
from tpresearch.train.state import TrainState
from tpresearch.train.step import Setup, StepResult, train_step
from tpresearch.train.stopping import AgreedStop

COLLECT_EVERY = 100
"""Steps between Python's garbage collections, which would otherwise stall one rank at a time at arbitrary points."""


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

    def evaluate(self) -> float | None:
        """The loss on held-out rows; None if there are none, or all ranks stop."""
        with self.setup.observers.phase("evaluation"):
            return held_out_loss(self.state.model, self.corpus.held_out, self.setup, self.stops)

    def stops(self) -> bool:
        """Whether all ranks stop here; collective."""
        if self.stop and self.stopped_by is None:
            self.stopped_by = self.stop.poll()
            if self.saver:
                self.saver.settle(self.stop.written)
        return self.stopped_by is not None

    def rows(self) -> Iterator[Metrics]:
        """Take all steps that are left, or those up to a stop; yield the metrics of each logged one, and of the last."""
        gc.collect()
        gc.disable()
        try:
            yield from self._rows()
        finally:
            gc.unfreeze()
            gc.enable()

    def _rows(self) -> Iterator[Metrics]:
        state, setup, train = self.state, self.setup, self.setup.cfg.train
        finite, taken = FiniteCheck(setup.device.torch), 0
        while state.step < setup.steps and self.stopped_by is None:
            result = self.step()
            finite.note(state.step, result)
            stops, last = self.stops(), state.step == setup.steps
            due = last or (train.eval_every is not None and state.step % train.eval_every == 0)
            evaluates = due and not stops
            saves = self.saver is not None and (stops or last or self.saver.due(state.step))
            loss = None
            if evaluates or saves or stops or state.step % train.log_every == 0:
                row = self._row(result, finite)
                loss = row["train/loss"]
                if evaluates:
                    row["val/loss"] = self.evaluate()
                yield row
            ends = last or self.stopped_by is not None
            if self.saver and (saves or ends):  # after the row, which is never behind the checkpoint
                with setup.observers.phase("pause"):
                    self.saver.save(state, state.step * setup.tokens_per_step, loss, last=ends)
            taken += 1
            if taken == 2 or state.step % COLLECT_EVERY == 0:
                with setup.observers.phase("pause"):
                    gc.collect()
                    if taken == 2:
                        gc.freeze()  # all that stays is there: no later collection goes through it again
        if self.saver:
            self.saver.finish()
        if self.stop:
            self.stop.settle()

    def _row(self, result: StepResult, finite: FiniteCheck) -> Metrics:
        """A logged row. But for evaluating and offloading, only here does the host wait for the device."""
        step, setup, cfg = self.state.step, self.setup, self.setup.cfg
        stops = cfg.train.on_nonfinite is OnNonfinite.stop
        if not stops:
            finite.warn_of_skipped()
        return {
            "train/step": step,
            "train/tokens": step * setup.tokens_per_step,
            "train/loss": finite.global_loss(step, result.loss, setup.mesh, stops),  # waits for the device
            "train/grad_norm": result.grad_norm.item(),
            "train/lr": learning_rate(step - 1, setup.steps, cfg.optimizer.lr, cfg.schedule),
            **setup.observers.metrics(),
        }
