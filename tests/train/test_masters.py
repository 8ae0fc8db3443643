"""bfloat16 on one rank: float32 masters in the optimizer are what a notebook does that casts its weights at each use."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from support.assembled import assembled
from support.checkpointed import equal, whole
from support.composed import config, corpus
from support.nets import model
from support.odd_nets import Counting
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from tpresearch.config import Config
from tpresearch.data.batches import Batches
from tpresearch.parallel.weights import from_seed
from tpresearch.plan.initializers import read_initializers
from tpresearch.plan.meta import plain_model
from tpresearch.train import state
from tpresearch.train.optim import build_optimizer, learning_rate, set_learning_rate
from tpresearch.train.state import TrainState
from tpresearch.train.step import train_step

STEPS, PARTS, ROWS = 3, 4, 8
SETTINGS = (
    "parallel=none",
    "train.dtype=bfloat16",
    "train.clip_grad_norm=null",
    "train.loss_chunk=null",
    f"train.micro_batch_size={ROWS // PARTS}",
)


def in_a_notebook(cfg: Config) -> dict[str, Tensor]:
    """Float32 weights, cast to bfloat16 for each micro-batch; autograd adds up their gradients in float32."""
    model = plain_model(cfg.model)
    from_seed(read_initializers(model), cfg.train.seed)(model)
    optimizer = build_optimizer(model.parameters(), cfg.optimizer)
    rows = Batches(corpus(), ROWS, cfg.train.seed)
    for step in range(STEPS):
        for part in rows.batch(step).split(ROWS // PARTS):
            cast = {name: weight.bfloat16() for name, weight in model.named_parameters()}
            logits = torch.func.functional_call(model, cast, part.inputs).float()
            loss = F.cross_entropy(logits.flatten(0, 1), part.targets.flatten(), reduction="sum")
            (loss / (ROWS * cfg.data.seq_len)).backward()
        set_learning_rate(optimizer, learning_rate(step, 100, cfg.optimizer.lr, cfg.schedule))
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def trained(cfg: Config, steps: int = STEPS) -> TrainState:
    with assembled(cfg) as loop:
        for _ in range(steps):
            loop.step()
    return loop.state


@pytest.mark.parametrize("model", ["llama2_debug", "toy_mlp"])
def test_masters_move_as_weights_that_are_cast_at_each_use(model: str) -> None:
    cfg = config(f"model={model}", *SETTINGS)
    state = trained(cfg)
    assert not any(isinstance(module, FSDPModule) for module in state.model.modules())
    theirs = in_a_notebook(cfg)
    with state.weights() as ours:
        assert ours.keys() == theirs.keys()
        for name, weight in theirs.items():
            assert ours[name].dtype == torch.float32
            assert torch.equal(ours[name], weight), name
        for copy, master in zip(state.model.parameters(), ours.values(), strict=True):
            assert torch.equal(copy, master.bfloat16())


def test_tied_weights_have_one_master() -> None:
    state = trained(config("model=llama2_debug", "model.tied=true", *SETTINGS))
    model = state.model
    assert model.get_parameter("output.weight") is model.get_parameter("tok_embeddings.weight")
    assert len(state.trained_parameters()) == len(list(model.parameters()))


def test_weights_set_from_outside_reach_the_copies() -> None:
    state = trained(config("model=llama2_debug", *SETTINGS), steps=0)
    with state.weights() as weights:
        for weight in weights.values():
            weight.fill_(1 / 3)
    third = torch.tensor(1 / 3).bfloat16()
    assert all((copy == third).all() for copy in state.model.parameters())


def test_in_bfloat16_alone_nothing_is_wider_but_buffers() -> None:
    state = trained(config("model=llama2_debug", *SETTINGS, "train.weights=bfloat16"), steps=1)
    assert state.masters is None
    moments = [t for held in state.optimizer.state.values() for key, t in held.items() if key != "step"]
    assert {t.dtype for t in (*moments, *state.model.parameters())} == {torch.bfloat16}
    assert state.model.rotary.dtype == torch.float32


def test_whole_numbers_and_flags_are_not_rounded() -> None:
    """A float32 run's losses to rounding: of 1001 as bfloat16 the model would make 0."""
    nets = ("parallel=none", "train.loss_chunk=null", *model(Counting))
    losses = []
    for words in ((), ("train.dtype=bfloat16",)):
        with assembled(config(*nets, *words)) as loop:
            losses.append(loop.step().loss.item())
            assert loop.state.trained_parameters()["counts.offsets"].dtype is torch.long
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("optimizer.split_masters=true",),
        ("optimizer.moment_dtype=bfloat16", "parallel.gradient_accumulation_fusion=true"),
    ],
    ids=" ".join,
)
def test_a_deep_copy_of_the_state_takes_the_same_step(words: tuple[str, ...]) -> None:
    with assembled(config("model=toy_mlp", *SETTINGS, *words)) as loop:
        loop.step()
        other, before = copy.deepcopy(loop.state), whole(loop.state)
        result = train_step(other, loop.read(), loop.setup)
        assert equal(whole(loop.state), before)
        assert loop.step().grad_norm == result.grad_norm
        assert equal(whole(loop.state), whole(other))
        assert not equal(whole(other), before)


def test_a_step_that_is_interrupted_before_a_master_has_its_gradient_leaves_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C in a notebook is noticed in the first line of Python that backward comes to."""
    move, calls = state._move_gradient_to_master, itertools.count(1)

    def interrupted(master: nn.Parameter, copy: Tensor) -> None:
        if next(calls) == 2:
            raise KeyboardInterrupt
        move(master, copy)

    cfg = config("model=toy_mlp", *SETTINGS)
    with assembled(cfg) as loop:
        undisturbed = loop.step().grad_norm
    monkeypatch.setattr(state, "_move_gradient_to_master", interrupted)
    with assembled(cfg) as loop:
        with pytest.raises(KeyboardInterrupt):
            loop.step()
        assert loop.step().grad_norm == undisturbed
