"""A loss or gradient that is not finite: the run stops and names it, or skips that update."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from support.commands import on_path
from support.trainings import Start, Train, Trained

pytestmark = pytest.mark.cli

ABSURD = ("parallel=none", "optimizer=sgd", "optimizer.lr=1e30", "schedule.warmup_steps=0", "logger=none")

# Llama2 whose logits overflow on rank 1 alone, in the second step.
POISONED = """
import os

from tpresearch.models.llama2 import Llama2


class Poisoned(Llama2):
    calls = 0

    def forward(self, tokens):
        logits = super().forward(tokens)
        if not self.training:
            return logits
        self.calls += 1
        return logits * float("inf") if self.calls == 2 and os.environ["RANK"] == "1" else logits
"""


def test_it_stops_with_the_step_and_the_metric_in_one_sentence(
    train: Start, small: list[str], tmp_path: Path
) -> None:
    done = train(None, tmp_path, *small, *ABSURD, "train.clip_grad_norm=null")
    assert done.code == 1
    error = "NonfiniteError: train/loss is nan at step 2"
    error += "; a lower optimizer.lr, or train.on_nonfinite=skip to leave out such updates"
    assert done.out.count(f"error  {error}\n") == 1
    assert "NonfiniteError" not in done.err
    assert "Traceback" not in done.err
    (folder,) = tmp_path.glob("outputs/train/*/*")
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["error"] == error
    assert summary["steps"] == 1
    assert len((folder / "metrics.jsonl").read_text().splitlines()) == 1
    assert error in (folder / "train.log").read_text()


@pytest.fixture(scope="session")
def skipping(trained: Train, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("poisoned")
    (folder / "poisoned.py").write_text(POISONED)
    return trained(
        2,
        *("parallel=fsdp", "model._target_=poisoned.Poisoned", "train.on_nonfinite=skip", "logger=none"),
        **on_path(folder),
    )


def test_a_skipped_update_is_warned_of_and_leaves_the_weights_finite(skipping: Trained) -> None:
    log = (skipping.folder / "train.log").read_text()
    skipped = [line for line in log.splitlines() if "its update is skipped" in line]
    assert len(skipped) == 1
    assert "WARNING" in skipped[0]
    assert "step 2: gradient norm is not finite; its update is skipped" in skipped[0]
    first, second, third = skipping.rows
    assert [row["train/skipped_updates"] for row in skipping.rows] == [0, 1, 0]
    assert skipping.json("summary.json")["train/skipped_updates"] == 1
    assert re.search(r"skipped updates +. 1, with gradient norms that are not finite", skipping.done.out)
    assert (second["train/loss"], second["train/grad_norm"]) == (None, None)
    assert all(math.isfinite(row["train/loss"]) for row in (first, third))
    assert math.isfinite(third["val/loss"])
    assert skipping.json("summary.json")["status"] == "completed"


def test_every_rank_skips_it(skipping: Trained) -> None:
    """The gradient overflowed on rank 1 alone: its norm is global, and so is what is done about it."""
    for rank in range(2):
        log = (skipping.folder / "ranks" / f"rank-0000{rank}.log").read_text()
        assert log.count("its update is skipped") == 1
