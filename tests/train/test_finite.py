"""Losses and norms between two logged rows: what is said of the first that is not finite."""

from __future__ import annotations

import math

import pytest
import torch

from tpresearch.train import finite
from tpresearch.train.finite import FiniteCheck, NonfiniteError
from tpresearch.train.step import StepResult

NAN, INF = math.nan, math.inf


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> FiniteCheck:
    """Of two ranks, whose shares of the loss are the same."""
    monkeypatch.setattr(finite, "sum_over", lambda mesh, sums, axes: 2 * sums)
    return FiniteCheck(torch.device("cpu"))


def row(check: FiniteCheck, first: int, *steps: tuple[float, float], stop: bool = True) -> float:
    """The loss of a row that is logged after these steps, of losses and norms."""
    for step, (loss, norm) in enumerate(steps, first):
        check.record(step, StepResult(torch.tensor(loss), torch.tensor(norm)))
    share = torch.tensor(steps[-1][0], dtype=torch.float64)
    return check.global_loss(first + len(steps) - 1, share, None, stop)  # pyrefly: ignore[bad-argument-type]


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ([(1, 1), (2, 1), (NAN, NAN)], "train/loss is nan at step 7"),
        ([(1, 1), (2, NAN), (3, 1)], "train/grad_norm is not finite at step 6"),
        ([(1, 1), (2, INF), (3, NAN)], "train/grad_norm is not finite at step 6"),
        ([(1, 1), (INF, NAN), (NAN, NAN)], "train/loss is not finite at step 6"),
        ([(1, 1), (NAN, 1), (3, 1)], "train/loss is not finite at step 7 or before it"),
    ],
)
def test_a_run_stops_at_the_next_row_with_the_first_step(
    check: FiniteCheck, steps: list[tuple[float, float]], said: str
) -> None:
    assert row(check, 1, (1, 1), (2, 1), (3, 1), (4, 1)) == 8
    with pytest.raises(NonfiniteError, match=f"^{said}; a lower optimizer.lr, "):
        row(check, 5, *steps)


def test_updates_that_were_skipped_are_counted_once(
    check: FiniteCheck, caplog: pytest.LogCaptureFixture
) -> None:
    assert row(check, 1, (1, 1), (NAN, NAN), (INF, INF), (4, 1), stop=False) == 8
    assert [check.skipped(), check.skipped()] == [2, 0]
    assert math.isnan(row(check, 5, (5, 1), (NAN, NAN), stop=False))
    assert [check.skipped(), check.skipped()] == [1, 0]
    assert row(check, 7, (7, 1)) == 14, "nothing is left of the rows before"
    assert [record.message for record in caplog.records] == [
        "2 gradient norms are not finite since step 2; their updates are skipped",
        "step 6: gradient norm is not finite; its update is skipped",
    ]
