"""Signals to any rank stop all ranks after the same step, and the run's record says so."""

from __future__ import annotations

import json
import os
import signal
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist
from support import composed
from support.processes import wait_for

from tpresearch.checkpoint.disk import complete_checkpoints
from tpresearch.config import Config
from tpresearch.config.world import World
from tpresearch.data.rows import PackedCorpus
from tpresearch.launch import Run
from tpresearch.launch.stop import StopFlag, Stopped
from tpresearch.parallel.device import CPU
from tpresearch.parallel.group import process_group
from tpresearch.track.record import read_metrics
from tpresearch.train import main
from tpresearch.train.observe import Observer
from tpresearch.train.preflight import preflight
from tpresearch.train.state import TrainState
from tpresearch.train.stopping import AgreedStop
from tpresearch.verify.ranks import Ranks

STEP, ROWS = "step", "evaluation"


def signalled(flag: StopFlag, number: signal.Signals) -> None:
    """Send this process a signal, and wait until its flag is up."""
    os.kill(os.getpid(), number)
    wait_for(lambda: flag.requested)


def hear_ctrl_c() -> None:
    """As a rank of torchrun does: the ranks of a test ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def polls(world: World, sent: dict[tuple[int, int], signal.Signals]) -> list[int | None]:
    """What each of six polls says where (rank, poll) is sent a signal before it."""
    hear_ctrl_c()
    with process_group(CPU, world), StopFlag() as flag:
        stop = AgreedStop(flag, lambda: 3 + world.rank)
        said: list[int | None] = []
        for number in range(6):
            if (world.rank, number) in sent:
                signalled(flag, sent[world.rank, number])
            said.append(stop.poll())
        stop.settle()
        assert stop.written == 3, "checkpoints that all ranks have written"
        dist.barrier()
    return said


@pytest.mark.parametrize(
    ("size", "sent", "said"),
    [
        (4, {}, [None] * 6),
        (4, {(2, 2): signal.SIGTERM}, [None, None, None, 15, 15, 15]),
        (4, {(0, 1): signal.SIGINT, (3, 3): signal.SIGTERM}, [None, None, 2, 2, 15, 15]),
        (1, {(0, 2): signal.SIGINT}, [None, None, 2, 2, 2, 2]),
    ],
)
def test_all_ranks_hear_of_a_signal_to_one_at_the_same_poll(
    ranks: Ranks, size: int, sent: dict[tuple[int, int], signal.Signals], said: list[int | None]
) -> None:
    assert ranks.run(size, polls, sent) == [said] * size


def train_until(
    world: World, cfg: Config, folder: Path, rank: int, step: int, where: str, number: signal.Signals
) -> tuple[str, int]:
    """Train; that rank is sent a signal in that step, or in the evaluation after it. Returns how it ended."""
    hear_ctrl_c()
    corpus, flags = composed.corpus(), []

    class Flag(StopFlag):
        def __enter__(self) -> Flag:
            flags.append(self)
            return super().__enter__()

    class Signalling(Observer):
        steps = 0

        def step(self, state: TrainState) -> AbstractContextManager[object]:
            self.steps = state.step + 1
            self._signal(STEP)
            return nullcontext()

        def phase(self, name: str) -> AbstractContextManager[object]:
            self._signal(name)
            return nullcontext()

        def _signal(self, at: str) -> None:
            if (self.steps, world.rank, where) == (step, rank, at):
                signalled(flags[0], number)

    pretended = {"prepare": lambda *_, **__: corpus, "check_same_job": lambda *_: None, "StopFlag": Flag}
    try:
        with patch.multiple(main, **pretended), patch.object(PackedCorpus, "save_tokenizer"):
            main.train(preflight(cfg, world), Run(folder, world), [Signalling()])
    except Stopped as stopped:
        return str(stopped), int(stopped.code or 0)
    return "completed", 0


@pytest.mark.parametrize(
    ("where", "number", "last_row"),
    [
        # Noted in step 3, it is sent with the poll after it, and heard at the one after step 4: no row is due there.
        (STEP, signal.SIGTERM, {"train/step": 4, "val/loss": None}),
        (STEP, signal.SIGINT, {"train/step": 4, "val/loss": None}),
        # Noted before the evaluation after step 3, which ends at the second of its batches.
        (ROWS, signal.SIGTERM, {"train/step": 3, "val/loss": None}),
    ],
)
def test_ranks_stop_after_the_same_step_and_say_so(
    ranks: Ranks, tmp_path: Path, where: str, number: signal.Signals, last_row: dict[str, Any]
) -> None:
    typed = ["model=toy_mlp", "parallel=ddp", "train.steps=9", "train.log_every=3", "train.eval_rows=11"]
    cfg = composed.config(*typed, "train.micro_batch_size=1", f"train.eval_every={3 if where == ROWS else 9}")
    said = ranks.run(2, train_until, cfg, tmp_path, 1, 3, where, number)
    assert said == [(f"stopped by {number.name}", 128 + number)] * 2
    summary = json.loads((tmp_path / "summary.json").read_text())
    status = "interrupted" if number is signal.SIGINT else "preempted"
    assert (summary["status"], summary["error"]) == (status, f"stopped by {number.name}")
    assert summary["steps"] == last_row["train/step"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/step"] for row in rows] == sorted({3, summary["steps"]})
    assert last_row.items() <= rows[-1].items()
    assert rows[-1]["train/loss"] > 0
    assert [found.step for found in complete_checkpoints(tmp_path)] == [summary["steps"]]
    if where == ROWS:
        (tmp_path / "undisturbed").mkdir()
        for folder in (tmp_path, tmp_path / "undisturbed"):
            assert ranks.run(2, train_until, cfg, folder, 1, 99, where, number) == [("completed", 0)] * 2
        found, undisturbed = (
            [(row["train/step"], row["val/loss"]) for row in read_metrics(folder)]
            for folder in (tmp_path, tmp_path / "undisturbed")
        )
        assert found == undisturbed, "the evaluation that was stopped is made up for"
