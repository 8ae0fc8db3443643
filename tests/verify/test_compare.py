"""Errors that a loss does not show are named: which quantity, which parameter, which step."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tpresearch.config.schema import Dtype
from tpresearch.config.world import World
from tpresearch.parallel.device import CPU
from tpresearch.parallel.group import process_group
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.trace import (
    MaxError,
    RunTrace,
    StepTrace,
    compare,
    differences_between_ranks,
    out_of_tolerance,
    tolerance,
)


def a_trace() -> RunTrace:
    tensors = {
        "a.weight": torch.tensor([1.0, -2.0], dtype=torch.float64),
        "b.weight": torch.tensor([4.0], dtype=torch.float64),
        "b.nothing": torch.empty(0, dtype=torch.float64),
    }
    step = StepTrace(2.5, 3.0, dict(tensors), dict(tensors), 2.0)
    return RunTrace(dict(tensors), [step, step])


def test_equal_traces_have_no_error() -> None:
    assert {worst.error for worst in compare(a_trace(), a_trace()).values()} == {0.0}


def test_a_gradient_scaled_by_the_tp_degree_is_named_though_loss_and_weights_agree() -> None:
    right = a_trace()
    scaled = dataclasses.replace(
        right.steps[1], gradients={**right.steps[1].gradients, "a.weight": right.initial["a.weight"] * 2}
    )
    found = compare(dataclasses.replace(right, steps=[right.steps[0], scaled]), right)
    assert found["loss"].error == found["weights"].error == 0.0
    assert (found["gradients"].error, found["gradients"].parameter, found["gradients"].step) == (
        1.0,
        "a.weight",
        1,
    )


def test_the_error_is_relative_to_the_tensors_greatest_value() -> None:
    right = a_trace()
    moved = dataclasses.replace(
        right, initial={**right.initial, "a.weight": right.initial["a.weight"] + torch.tensor([0.5, 0.0])}
    )
    assert compare(moved, right)["initial weights"].error == 0.25


def test_a_gradient_that_cancels_is_held_to_those_of_its_layer() -> None:
    """Of keys' biases rounding is all that is left, and has no digit in common with that of another order."""
    right = a_trace()
    step = right.steps[0]

    def with_bias(gradient: float) -> RunTrace:
        gradients = {**step.gradients, "a.bias": torch.tensor([gradient])}
        return dataclasses.replace(right, steps=[dataclasses.replace(step, gradients=gradients)])

    assert compare(with_bias(3e-17), with_bias(-1e-17))["gradients"].error == pytest.approx(2e-17)
    assert compare(with_bias(6.0), with_bias(3.0))["gradients"] == MaxError(1.0, 0, "a.bias")


@pytest.mark.parametrize(
    ("quantity", "field"), [("loss", "loss"), ("grad norm", "grad_norm"), ("held-out loss", "held_out")]
)
def test_numbers_that_are_too_small_are_as_wrong_as_those_that_are_too_large(
    quantity: str, field: str
) -> None:
    right = a_trace()

    def with_second(value: float) -> RunTrace:
        numbers: dict[str, Any] = {field: value}
        return dataclasses.replace(
            right, steps=[right.steps[0], dataclasses.replace(right.steps[1], **numbers)]
        )

    for ours, reference, error in ((3.0, 4.0, 0.25), (5.0, 4.0, 0.25), (-0.5, 0.0, 0.5), (3.0, -4.0, 1.75)):
        found = compare(with_second(ours), with_second(reference))
        assert found.pop(quantity) == MaxError(error, 1)
        assert {worst.error for worst in found.values()} == {0.0}


def test_nan_is_the_worst_there_is() -> None:
    right = a_trace()
    lost = dataclasses.replace(
        right.steps[0], gradients={**right.initial, "b.weight": torch.tensor([float("nan")])}
    )
    worst = compare(dataclasses.replace(right, steps=[lost, right.steps[1]]), right)["gradients"]
    assert worst.parameter == "b.weight"
    assert not worst.error <= tolerance("gradients", Dtype.bfloat16)


def test_a_missing_gradient_is_out() -> None:
    right = a_trace()
    step = dataclasses.replace(right.steps[0], gradients={"a.weight": right.initial["a.weight"]})
    assert compare(dataclasses.replace(right, steps=[step, step]), right)["gradients"].error == float("inf")


def different(world: World) -> list[MaxError]:
    """What ranks find between them, of which the last has another number in one place, and NaN in each of the others."""
    own = world.rank == world.size - 1
    tensors = {"a": torch.tensor([4.0, 3.0 if own else 2.0])}
    tensors |= {str(place): torch.tensor([torch.nan if own else 1.0]) for place in range(6)}
    with process_group(CPU, world):
        return differences_between_ranks(1, tensors, CPU.torch)


def test_what_one_rank_has_alone_is_named_on_all(ranks: Ranks) -> None:
    for a, *lost in ranks.run(2, different):
        assert a == MaxError(0.25, 1, "a")
        assert all(out_of_tolerance({"between ranks": each}, Dtype.bfloat16) for each in lost)


@pytest.mark.parametrize("dtype", list(Dtype))
def test_initial_weights_must_be_the_same_to_the_bit(dtype: Dtype) -> None:
    assert tolerance("initial weights", dtype) == 0.0 < tolerance("loss", dtype)


def test_below_float64_updated_weights_may_differ_by_more_than_gradients() -> None:
    """AdamW moves a weight alike for a gradient near 0 and for a large one, whichever sign rounding gives it."""
    for dtype, error in ((Dtype.float32, 1.5e-4), (Dtype.bfloat16, 0.13)):
        apart = {"gradients": MaxError(error), "weights": MaxError(error)}
        assert out_of_tolerance(apart, dtype) == ["gradients"]
    assert out_of_tolerance({"weights": MaxError(1.5e-10)}, Dtype.float64) == ["weights"]
