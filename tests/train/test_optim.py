"""Learning rates by hand, and which parameters decay."""

from __future__ import annotations

import math

import pytest
from torch import nn

from tpresearch.config.schema import OptimizerConfig, ScheduleConfig, ScheduleName
from tpresearch.train.optim import build_optimizer, learning_rate


def rates(name: str, **settings: float) -> list[float]:
    schedule = ScheduleConfig(name=ScheduleName(name), warmup_steps=4, **settings)  # type: ignore[arg-type]
    return [learning_rate(step, 20, 2.0, schedule) for step in range(20)]


def test_warmup_is_linear_and_reaches_the_peak() -> None:
    assert rates("constant")[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]
    assert rates("constant")[-1] == 2.0


def test_cosine_falls_by_half_at_its_middle() -> None:
    found = rates("cosine", min_lr_ratio=0.1)
    assert found[4] == 2.0
    assert found[12] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert found[19] == pytest.approx(2.0 * (0.1 + 0.45 * (1 + math.cos(math.pi * 15 / 16))))


def test_wsd_is_level_and_then_falls_in_a_line() -> None:
    found = rates("wsd", decay_ratio=0.25, min_lr_ratio=0.0)
    assert found[4:16] == [2.0] * 12
    assert found[16:] == pytest.approx([1.6, 1.2, 0.8, 0.4])


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(0, 10, 1.0, ScheduleConfig(warmup_steps=0)) == 1.0


def test_only_matrices_decay() -> None:
    groups = build_optimizer(nn.Linear(3, 4).parameters(), OptimizerConfig(weight_decay=0.1)).param_groups
    assert {tuple(p.dim() for p in group["params"]): group["weight_decay"] for group in groups} == {
        (2,): 0.1,
        (1,): 0.0,
    }


def test_vectors_decay_too_where_that_is_asked_for() -> None:
    (group,) = build_optimizer(
        nn.Linear(3, 4).parameters(), OptimizerConfig(weight_decay=0.1, decay_vectors=True)
    ).param_groups
    assert ([p.dim() for p in group["params"]], group["weight_decay"]) == ([2, 1], 0.1)
