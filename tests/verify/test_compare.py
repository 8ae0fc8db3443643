"""Errors that a loss does not show are named: which quantity, which parameter, which step."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tpresearch.config.schema import Dtype
from tpresearch.verify.trace import MaxError, RunTrace, StepTrace, compare, out_of_tolerance, tolerance


def a_trace() -> RunTrace:
    tensors = {
        "a": torch.tensor([1.0, -2.0], dtype=torch.float64),
        "b": torch.tensor([4.0], dtype=torch.float64),
    }
    step = StepTrace(2.5, 3.0, dict(tensors), dict(tensors), 2.0)
    return RunTrace(dict(tensors), [step, step])


def test_equal_traces_have_no_error() -> None:
    assert {worst.error for worst in compare(a_trace(), a_trace()).values()} == {0.0}


def test_a_gradient_scaled_by_the_tp_degree_is_named_though_loss_and_weights_agree() -> None:
    right = a_trace()
    scaled = dataclasses.replace(
        right.steps[1], gradients={**right.steps[1].gradients, "a": right.initial["a"] * 2}
    )
    found = compare(dataclasses.replace(right, steps=[right.steps[0], scaled]), right)
    assert found["loss"].error == found["weights"].error == 0.0
    assert (found["gradients"].error, found["gradients"].parameter, found["gradients"].step) == (1.0, "a", 1)


def test_the_error_is_relative_to_the_tensors_greatest_value() -> None:
    right = a_trace()
    moved = dataclasses.replace(
        right, initial={**right.initial, "a": right.initial["a"] + torch.tensor([0.5, 0.0])}
    )
    assert compare(moved, right)["initial weights"].error == 0.25


def test_nan_is_the_worst_there_is() -> None:
    right = a_trace()
    lost = dataclasses.replace(right.steps[0], gradients={**right.initial, "b": torch.tensor([float("nan")])})
    worst = compare(dataclasses.replace(right, steps=[lost, right.steps[1]]), right)["gradients"]
    assert worst.parameter == "b"
    assert not worst.error <= tolerance("gradients", Dtype.bfloat16)


def test_a_missing_gradient_is_out() -> None:
    right = a_trace()
    step = dataclasses.replace(right.steps[0], gradients={"a": right.initial["a"]})
    assert compare(dataclasses.replace(right, steps=[step, step]), right)["gradients"].error == float("inf")


@pytest.mark.parametrize("dtype", list(Dtype))
def test_initial_weights_must_be_the_same_to_the_bit(dtype: Dtype) -> None:
    assert tolerance("initial weights", dtype) == 0.0 < tolerance("loss", dtype)


def test_below_float64_updated_weights_may_differ_by_more_than_gradients() -> None:
    """AdamW moves a weight alike for a gradient near 0 and for a large one, whichever sign rounding gives it."""
    for dtype, error in ((Dtype.float32, 1.5e-4), (Dtype.bfloat16, 0.13)):
        apart = {"gradients": MaxError(error), "weights": MaxError(error)}
        assert out_of_tolerance(apart, dtype) == ["gradients"]
    assert out_of_tolerance({"weights": MaxError(1.5e-10)}, Dtype.float64) == ["weights"]
