"""The reference that plans are held to: plain torch, and a model that draws random numbers is not held to it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from support.composed import config, corpus
from support.nets import AfterBlocks, Dropped, Projected, model

from tpresearch.config import ConfigError
from tpresearch.config.world import World
from tpresearch.train.loop import Loop
from tpresearch.verify import reference
from tpresearch.verify.plans import check_moments, check_plan
from tpresearch.verify.trace import compare, trace_run

JUDGED = {
    "tpresearch.train.step",
    "tpresearch.train.losses",
    "tpresearch.train.loop",
    "tpresearch.parallel.apply",
    "tpresearch.parallel.norm",
    "tpresearch.parallel.mesh",
}


def test_it_imports_nothing_of_what_it_judges() -> None:
    tree = ast.parse(Path(reference.__file__).read_text())
    used = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not used & JUDGED
    assert not any("distributed" in str(name) for name in used)


def test_its_held_out_loss_is_the_cross_entropy_whatever_loss_is_trained() -> None:
    cfg = config("model=toy_mlp", "parallel=none", "train.loss=sum", "train.eval_rows=11")
    expected = reference.reference(cfg, corpus(), 1).steps[0].held_out
    assert trace_run(cfg, corpus(), World(), 1).steps[0].held_out == pytest.approx(expected)


def test_what_buffers_draw_follows_from_the_seed_alone() -> None:
    losses = []
    for seed in (0, 1):
        cfg = config(*model(Projected), "parallel=none", f"train.seed={seed}", "data.repeat_batches=1")
        torch.manual_seed(7)  # of a caller, whose draws are as they would have been
        (step,) = trace_run(cfg, corpus(), World(), 1).steps
        assert torch.initial_seed() == 7
        torch.manual_seed(8)
        assert reference.reference(cfg, corpus(), 1).steps[0].loss == pytest.approx(step.loss)
        losses.append(step.loss)
    assert losses[0] != pytest.approx(losses[1])


def test_its_norm_is_that_of_all_gradients_to_the_last_digits_of_a_float32() -> None:
    """Torch's own on a CPU, of half a million numbers, is not, and right plans of large models would be out of tolerance."""
    cfg = config("model=toy_mlp", "model.hidden_dim=4096", "parallel=none")
    (step,) = reference.reference(cfg, corpus(), 1).steps
    exact = sum(gradient.square().sum().item() for gradient in step.gradients.values()) ** 0.5
    assert step.grad_norm == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_moments_that_round_are_refused(dtype: str) -> None:
    words = f"train.dtype={dtype}", "optimizer.moment_dtype=bfloat16", "verify.world_size=2"
    with pytest.raises(ConfigError, match="equality with one process is not claimed; null") as caught:
        check_moments(config("model=toy_mlp", "parallel=fsdp", *words))
    assert caught.value.fix == {"optimizer.moment_dtype": None}


def test_a_model_that_draws_random_numbers_is_refused_with_where_it_does() -> None:
    with pytest.raises(ConfigError) as caught:
        check_plan(config(*model(Dropped), "parallel=fsdp", "verify.world_size=2"))
    assert "random numbers in drop" in caught.value.why


@pytest.mark.parametrize("is_left", [False, True])
def test_a_model_that_an_evaluation_leaves_in_its_mode_is_seen_in_the_next_step(
    is_left: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg, evaluate = config(*model(AfterBlocks), "parallel=none", "train.dtype=float64"), Loop.evaluate

    def evaluate_and_leave(loop: Loop) -> float | None:
        loss = evaluate(loop)
        loop.state.model.train(not is_left)
        return loss

    monkeypatch.setattr(Loop, "evaluate", evaluate_and_leave)
    found = compare(trace_run(cfg, corpus(), World(), 2), reference.reference(cfg, corpus(), 2))["gradients"]
    assert (found.step == 1 and found.error > 1e-3) if is_left else found.error < 1e-10
