"""A checkpoint written in the background is of a copy in host memory, for which there may be no room."""

from __future__ import annotations

import math
import os
from pathlib import Path
from threading import Event
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from support.assembled import assembled
from support.checkpointed import on_disk
from support.composed import config
from support.made_checkpoints import ABOUT
from support.processes import wait_for
from torch import nn
from torch.distributed.checkpoint.staging import BlockingAsyncStager

from tpresearch.checkpoint.disk import complete_checkpoints, folder_of, read_checkpoint
from tpresearch.checkpoint.save import SaveFailed, Saver
from tpresearch.config.schema import CheckpointConfig
from tpresearch.train.finite import NonfiniteError
from tpresearch.train.observe import Observer
from tpresearch.train.state import TrainState

NO_ROOM = ("CUDA error: out of memory\nCUDA kernel errors", "DefaultCPUAllocator: can't allocate memory: you")


def test_it_is_of_its_step_whatever_the_next_steps_change_meanwhile(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def written_late(*what: Any) -> None:
        may_write.wait()
        write(*what)

    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda number: synced.add(os.fstat(number).st_ino))
    (tmp_path / "metrics.jsonl").touch()
    layer, may_write = nn.Linear(2, 2), Event()
    state = TrainState(0, layer, torch.optim.SGD(layer.parameters()))
    saver = Saver(tmp_path, CheckpointConfig(), ABOUT, None, background=True)
    write = saver._write_files
    monkeypatch.setattr(saver, "_write_files", written_late)
    saver.start(0)
    for step in (1, 2):  # the second into the copy of the first
        may_write.clear()
        state.step = step
        nn.init.constant_(layer.weight, step)
        saver.save(state, 96 * step, 1.0)
        assert (saver.started, saver.written) == (step, step - 1)
        nn.init.constant_(layer.weight, 9)
        may_write.set()
        wait_for(lambda step=step: saver.written == step)
        saver.commit_written(step - 1)  # as some rank has not written it
        assert [found.step for found in complete_checkpoints(tmp_path)] == list(range(1, step))
        saver.commit_written(step)
        manifest = read_checkpoint(folder_of(tmp_path, step)).manifest
        assert (manifest.tokens, manifest.loss) == (96 * step, 1.0)
        assert on_disk(folder_of(tmp_path, step))["model.weight"].unique().tolist() == [step]
    assert [found.step for found in complete_checkpoints(tmp_path)] == [1, 2]
    assert (tmp_path / "metrics.jsonl").stat().st_ino in synced, "no crash takes the rows of its steps alone"


@pytest.mark.parametrize("background", [False, True])
def test_weights_that_are_not_finite_are_left_out_and_a_step_is_saved_once(
    caplog: pytest.LogCaptureFixture, tmp_path: Path, background: bool
) -> None:
    layer = nn.Linear(2, 2)
    state = TrainState(1, layer, torch.optim.SGD(layer.parameters()))
    saver = Saver(tmp_path, CheckpointConfig(), ABOUT, None, background)
    saver.start(0)
    nn.init.constant_(layer.weight, float("nan"))
    saver.save(state, 0, None)
    saver.finish()
    assert "step 1: checkpoint not saved: model.weight is not finite" in caplog.text
    state.step = 2
    with pytest.raises(SaveFailed, match=r"no checkpoint of the last step, 2: model\.weight is not finite"):
        saver.save(state, 0, None, last=True)
    assert not list((tmp_path / "checkpoints").iterdir())
    nn.init.ones_(layer.weight)
    state.step = 3
    with caplog.at_level("INFO"):
        for _ in range(2):
            saver.save(state, 0, 1.0)
            saver.finish()
    assert (caplog.text.count("checkpoint: step 3, "), caplog.text.count("not saved")) == (1, 1)
    assert [found.step for found in complete_checkpoints(tmp_path)] == [3]


class Diverges(Observer):
    """In the second step."""

    def gradients(self, state: TrainState) -> None:
        if state.step == 1:
            for parameter in state.trained_parameters().values():
                parameter.grad = torch.full_like(parameter, math.nan)


def test_a_run_that_ends_in_nan_keeps_what_was_being_written(tmp_path: Path) -> None:
    cfg = config("parallel=none", "model=toy_mlp", "checkpoint.every=1", "train.log_every=1")
    with assembled(cfg, watching=[Diverges()]) as loop:
        loop.saver = Saver(tmp_path, cfg.checkpoint, ABOUT, None, background=True)
        loop.saver.start(0)
        with pytest.raises(NonfiniteError, match="at step 2"):
            list(loop.rows())
    assert [found.step for found in complete_checkpoints(tmp_path)] == [1]


@pytest.mark.parametrize("said", NO_ROOM)
def test_without_room_it_is_left_out_and_the_next_is_written(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path, said: str
) -> None:
    layer = nn.Linear(2, 2)
    state = TrainState(1, layer, torch.optim.SGD(layer.parameters()))
    saver = Saver(tmp_path, CheckpointConfig(), ABOUT, None, background=True)
    saver.start(0)
    with monkeypatch.context() as patch:
        patch.setattr(BlockingAsyncStager, "stage", Mock(side_effect=RuntimeError(said)))
        saver.save(state, 0, 1.0)
    why = "host memory has no room for a copy of the state; checkpoint.background=false writes without one"
    assert f"step 1: checkpoint not saved: {why}" in caplog.text
    state.step = 2
    saver.save(state, 0, 1.0)
    saver.finish()
    assert [found.step for found in complete_checkpoints(tmp_path)] == [2]


def test_another_error_of_the_device_is_not_taken_for_that(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    layer = nn.Linear(2, 2)
    saver = Saver(tmp_path, CheckpointConfig(), ABOUT, None, background=True)
    saver.start(0)
    illegal = RuntimeError("CUDA error: an illegal memory access was encountered")
    monkeypatch.setattr(BlockingAsyncStager, "stage", Mock(side_effect=illegal))
    with pytest.raises(RuntimeError, match="illegal"):
        saver.save(TrainState(1, layer, torch.optim.SGD(layer.parameters())), 0, 1.0)
