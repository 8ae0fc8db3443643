"""Bounds stand beside the fields of the schema, and each of them is kept."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
from support.composed import config

from tpresearch.config import ConfigError
from tpresearch.config.schema import ComposedConfig
from tpresearch.config.values import Within, _annotations, check_bounds


def bounded(kind: type = ComposedConfig, prefix: str = "") -> Iterator[tuple[str, Within]]:
    for name, declares in _annotations(kind).items():
        yield from ((f"{prefix}{name}", bound) for bound in declares if isinstance(bound, Within))
    for field in dataclasses.fields(kind):
        default = field.default_factory() if callable(field.default_factory) else None
        if dataclasses.is_dataclass(default):
            yield from bounded(type(default), f"{prefix}{field.name}.")


FIELDS = dict(bounded())


def outside(bound: Within) -> list[float]:
    below = [bound.least if bound.open_below else bound.least - 1]
    above = [bound.most if bound.open_above else bound.most + 1] if bound.most < math.inf else []
    return [*below, *above, math.nan, math.inf, -math.inf]


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
    ("key", "text", "legal"),
    [
        ("optimizer.name", "sgd", "OptimizerName.adamw, OptimizerName.sgd"),
        ("train.dtype", "float64", "Dtype.float32, Dtype.bfloat16, Dtype.float64"),
        ("optimizer.moment_dtype", "bfloat16", "WeightDtype.float32, WeightDtype.bfloat16"),
        ("device", "cuda", "DeviceKind.auto, DeviceKind.cpu, DeviceKind.cuda"),
        ("verify.optimizers", ["sgd"], "OptimizerName.adamw, OptimizerName.sgd"),
    ],
)
def test_text_in_place_of_an_enum_is_refused(key: str, text: str | list[str], legal: str) -> None:
    """It equals the member, so that `optimizer.name is OptimizerName.sgd` would be silently false."""
    cfg = config()
    branch, _, name = key.rpartition(".")
    setattr(getattr(cfg, branch) if branch else cfg, name, text)
    with pytest.raises(ConfigError, match=rf"^{key}=\w+: not a member of \w+; one of {legal}$"):
        check_bounds(cfg)


def test_there_are_as_many_as_the_schema_has_numbers() -> None:
    assert len(FIELDS) >= 29
    assert {"train.steps", "optimizer.betas", "schedule.decay_ratio", "verify.world_size"} < FIELDS.keys()
