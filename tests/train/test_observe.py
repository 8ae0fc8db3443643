"""What an observer is told, and what a loss may ask of the model: neither needs a change of the step or the loop."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import Mock

import pytest
import torch
from support.assembled import assembled
from support.composed import config

from tpresearch.train.observe import Observer
from tpresearch.train.state import TrainState
from tpresearch.train.watch import CountedStep, Expected

TOY = ("model=toy_mlp", "parallel=none")


class Diary(Observer):
    def __init__(self) -> None:
        self.events: list[str] = []

    def start(self, state: TrainState) -> None:
        self.events.append(f"start at {state.step}")

    @contextmanager
    def step(self, state: TrainState) -> Iterator[None]:
        self.events.append(f"step {state.step}")
        yield
        self.events.append("stepped")

    def phase(self, name: str) -> AbstractContextManager[object]:
        self.events.append(name)
        return nullcontext()

    def gradients(self, state: TrainState) -> None:
        assert all(p.grad is not None for p in state.model.parameters())
        self.events.append("gradients")

    def metrics(self) -> dict[str, float | int | None]:
        self.events.append("metrics")
        return {"comm/bytes_per_step": 7}


def test_an_observer_is_told_each_event_in_order() -> None:
    diary = Diary()
    settings = ("train.steps=1", "train.micro_batch_size=4", "train.eval_rows=0")
    with assembled(config(*TOY, *settings), watching=[diary]) as loop:
        (row,) = list(loop.rows())
    micro_batch = ["forward", "loss", "backward"]
    assert diary.events == [
        *("start at 0", "data", "step 0", *micro_batch, *micro_batch, "backward", "gradients"),
        *("clip", "optimizer", "stepped", "metrics", "evaluation"),
    ]
    assert row["comm/bytes_per_step"] == 7
    assert row["train/step"] == 1


def test_no_garbage_collection_stalls_a_step_nor_goes_through_what_stays() -> None:
    with assembled(config(*TOY, "train.steps=3", "train.eval_rows=0")) as loop:
        before, found = gc.get_freeze_count(), []
        for _ in loop.rows():
            assert not gc.isenabled()
            found.append(gc.get_freeze_count() > before)
    assert found == [False, False, True]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def test_the_end_of_a_checkpoint_that_was_written_beside_steps_is_a_pause() -> None:
    diary = Diary()
    with assembled(config(*TOY, "train.steps=2", "train.eval_rows=0"), watching=[diary]) as loop:
        commit = Mock(side_effect=lambda written: diary.events.append(f"commit {written}"))
        loop.saver = Mock(commit_written=commit, is_due=lambda step: False)
        loop.stop = Mock(poll=lambda: None, written=7)
        list(loop.rows())
    commits = [at for at, event in enumerate(diary.events) if event == "commit 7"]
    assert [diary.events[at - 1] for at in commits] == ["pause"] * 2


def test_weights_of_a_rank_of_its_own_are_not_drawn_again_where_a_run_resumes() -> None:
    with assembled(config(*TOY, "defects.weights_per_rank=true")) as loop:
        weight = next(loop.state.model.parameters())
        for step, drawn in ((3, False), (0, True)):
            torch.nn.init.ones_(weight)
            loop.state.step = step
            loop.setup.observers.start(loop.state)
            assert bool((weight != 1).any()) == drawn


@pytest.mark.parametrize(("begun", "steps", "counted"), [(0, 5, 1), (3, 9, 4), (4, 5, 4), (0, 1, 0)])
def test_the_second_step_of_a_process_is_counted_wherever_the_run_starts(
    begun: int, steps: int, counted: int
) -> None:
    at: list[int] = []
    with assembled(config(*TOY)) as loop:
        watch = CountedStep(
            loop.setup.mesh, Expected(None, {}), steps - 1, report=lambda _: at.append(state.step)
        )
        state = loop.state
        state.step = begun
        watch.start(state)
        for state.step in range(begun, steps):
            with watch.step(state):
                pass
    assert at == [counted]


@pytest.mark.parametrize("used", [True, False])
def test_a_counted_step_without_a_gradient_claims_less(used: bool) -> None:
    with assembled(config(*TOY)) as loop:
        expected, state = Mock(), loop.state
        watch = CountedStep(loop.setup.mesh, expected, 9)
        watch.start(state)
        state.step = 1
        for parameter in state.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        parameter.grad = parameter.grad if used else None
        with watch.step(state):
            watch.gradients(state)
        assert watch.counted
        assert watch.counted.expected is (expected if used else expected.for_unused_parameters())
