"""How long a run goes on, which of its steps are logged, and that it can be had again."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.trainings import ROWS, Start, Train, Trained

pytestmark = pytest.mark.cli


def test_a_budget_of_tokens_is_rounded_up_to_steps(run_fsdp: Trained) -> None:
    assert run_fsdp.json("summary.json")["steps"] == 5  # 600 tokens, 8 x 16 a step
    assert run_fsdp.json("summary.json")["tokens"] == 640


def test_rows_are_logged_every_so_often_where_evaluated_and_at_the_end(run_fsdp: Trained) -> None:
    assert run_fsdp.column("train/step") == [2, 3, 4, 5]
    assert run_fsdp.column("train/tokens") == [256, 384, 512, 640]
    assert [value is not None for value in run_fsdp.column("val/loss")] == [False, True, False, True]


def test_the_learning_rate_is_the_schedule_s(run_fsdp: Trained) -> None:
    assert run_fsdp.column("train/lr") == pytest.approx([3e-3 * step / 10 for step in (2, 3, 4, 5)])


def test_the_same_seed_gives_the_same_run_to_the_bit(trained: Train, run_fsdp: Trained) -> None:
    again = trained(2, *ROWS, "logger=none")
    for name in ("train/loss", "train/grad_norm", "val/loss"):
        assert again.column(name) == run_fsdp.column(name)


def test_another_seed_gives_another(
    train_py: Start, small: list[str], run_fsdp: Trained, tmp_path: Path
) -> None:
    done = train_py(*small, *ROWS, "parallel=none", "logger=none", "train.seed=1", "hydra.run.dir=run")
    assert done.code == 0, done.err
    other = Trained(done, tmp_path / "cwd" / "run")
    assert other.column("train/step") == run_fsdp.column("train/step")
    assert not set(other.column("train/loss")) & set(run_fsdp.column("train/loss"))
