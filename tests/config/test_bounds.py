"""Bounds stand beside the fields of the schema, and each of them is kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, get_args

import pytest
from support.composed import config

from tpresearch.config import ConfigError
from tpresearch.config.errors import first_line
from tpresearch.config.schema import ComposedConfig
from tpresearch.config.values import Within, check_bounds, declared


def bounded(kind: Any = ComposedConfig, prefix: str = "") -> Iterator[tuple[str, Within]]:
    for name, (hint, bound) in declared(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from bounded(hint, f"{prefix}{name}.")
        assert bound or not {int, float} & {hint, *get_args(hint)}, f"{prefix}{name} has no bounds"
        if bound:
            yield f"{prefix}{name}", bound


FIELDS = dict(bounded())


def outside(bound: Within) -> list[float]:
    below = [bound.least if bound.open_below else bound.least - 1]
    above = [bound.most if bound.open_above else bound.most + 1] if bound.most < math.inf else []
    return [*below, *above, math.nan, math.inf, -math.inf, 10**400]


@pytest.mark.parametrize("key", FIELDS)
def test_what_is_outside_is_refused_and_the_bound_itself_is_not(key: str) -> None:
    *path, name = key.split(".")
    cfg = owner = config()
    for part in path:
        owner = getattr(owner, part)
    before, bound = getattr(owner, name), FIELDS[key]
    bounds = [bound.least] * (not bound.open_below) + [bound.most] * (
        bound.most < math.inf and not bound.open_above
    )
    for number in bounds:
        setattr(owner, name, [number] if isinstance(before, list) else number)
        check_bounds(cfg)
    for number in outside(bound):
        setattr(owner, name, [number] if isinstance(before, list) else number)
        with pytest.raises(ConfigError) as caught:
            check_bounds(cfg)
        assert caught.value.field == key
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "legal"),
    [
        ("optimizer.name", "sgd", "one of OptimizerName.adamw, OptimizerName.sgd"),
        ("optimizer.moment_dtype", "bfloat16", "one of WeightDtype.float32, WeightDtype.bfloat16 or null"),
        ("verify.optimizers", ["sgd"], "a list of one of OptimizerName.adamw, OptimizerName.sgd"),
        ("device", "cuda", "one of DeviceKind.auto, DeviceKind.cpu, DeviceKind.cuda"),
        ("train.steps", "100", "a whole number or null"),
        ("optimizer.lr", True, "a number"),
        ("logger.tags", [1], "a list of text"),
    ],
)
def test_a_value_of_another_type_is_refused(key: str, value: object, legal: str) -> None:
    """Text equals the member of an enum, so that `optimizer.name is OptimizerName.sgd` would be silently false."""
    cfg = config()
    branch, _, name = key.rpartition(".")
    setattr(getattr(cfg, branch) if branch else cfg, name, value)
    with pytest.raises(ConfigError, match=rf"^{key}=.*: of the wrong type; {legal}$"):
        check_bounds(cfg)


@pytest.mark.parametrize("key", ["init_from", "logger.group", "logger.dir", "data.name"])
def test_the_word_none_is_null_and_no_name(key: str) -> None:
    """As Python writes it, and `wandb agent` passes it on: a W&B group, or a folder, of that name would be nobody's wish."""
    config(f"{key}=null")
    with pytest.raises(ConfigError, match=rf"^{key}=None: .*; null$") as refused:
        config(f"{key}=None")
    assert refused.value.fix == {key: "null"}


def test_a_bound_is_said_in_words() -> None:
    said = {
        "optimizer.lr": "a number above 0",
        "train.steps": "1 or more",
        "optimizer.weight_decay": "0 or more",
    }
    said |= {"optimizer.betas": "a number from 0 to below 1", "optimizer.momentum": "a number from 0 to 1"}
    assert {key: str(FIELDS[key]) for key in said} == said


def test_an_error_of_one_long_line_is_cut_where_it_is_told_in_a_table() -> None:
    assert first_line(ValueError("\nshort one\nand more")) == "short one"
    assert first_line(ValueError("x" * 9000)) == "x" * 1000 + "..."
