"""Models of which a trainer could lose a part in silence: trained as by a plain loop of PyTorch on the class itself."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from support.assembled import assembled
from support.composed import SEQ_LEN, config, corpus
from support.nets import AfterBlocks, ComplexPositions, HookedHead, PartlyInEvaluation, Routed, model
from torch import nn

from tpresearch.config import Config
from tpresearch.config.axes import DATA_AXES
from tpresearch.config.world import World
from tpresearch.data.batches import Batches, eval_batches
from tpresearch.parallel.mesh import sum_over
from tpresearch.train.finite import NonfiniteError
from tpresearch.train.losses import build_token_loss
from tpresearch.train.optim import learning_rate
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.trace import Tensors, full_tensors, whole_weights

STEPS = 3


def ours(world: World, cfg: Config) -> tuple[Tensors, list[float], Tensors]:
    """The initial weights, the losses of a few steps, with an evaluation after each, and the weights after them."""
    with assembled(cfg, world) as loop:
        initial, losses = whole_weights(loop.state), []
        for _ in range(STEPS):
            losses.append(sum_over(loop.setup.mesh, loop.step().loss, DATA_AXES).item())
            loop.evaluate()
        return initial, losses, whole_weights(loop.state)


def plain(kind: type[nn.Module], cfg: Config, initial: Tensors) -> tuple[list[float], Tensors]:
    """Losses and last weights of a loop that knows of nothing but the class."""
    net = kind(**cfg.model.args)
    for parameter in net.parameters():
        parameter.data = parameter.data.double()
    net.load_state_dict(initial, strict=False)
    optimizer = torch.optim.SGD(net.parameters(), cfg.optimizer.lr, cfg.optimizer.momentum)
    batches, losses = Batches(corpus(), cfg.train.global_batch_size, cfg.train.seed), []
    for step in range(STEPS):
        inputs, targets = batches.batch(step)
        loss = F.cross_entropy(net(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.param_groups[0]["lr"] = learning_rate(step, STEPS, cfg.optimizer.lr, cfg.schedule)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, full_tensors(dict(net.named_parameters()))


@pytest.mark.parametrize(
    ("kind", "plan", "size"),
    [
        *[(kind, "none", 1) for kind in (ComplexPositions, HookedHead, PartlyInEvaluation)],
        (HookedHead, "fsdp", 2),
        (AfterBlocks, "fsdp", 2),
        (Routed, "ddp", 2),
    ],
)
def test_it_trains_as_a_plain_loop_does(ranks: Ranks, kind: type[nn.Module], plan: str, size: int) -> None:
    words = (
        "train.dtype=float64",
        "train.clip_grad_norm=null",
        f"train.steps={STEPS}",
        "schedule.warmup_steps=0",
    )
    momentum = "optimizer=sgd", "optimizer.weight_decay=0", "optimizer.momentum=0.5"
    cfg = config(*model(kind), f"parallel={plan}", "model.dim=8", "model.hidden_dim=16", *words, *momentum)
    for initial, losses, weights in ranks.run(size, ours, cfg) if size > 1 else [ours(World(), cfg)]:
        wanted, right = plain(kind, cfg, initial)
        assert losses == pytest.approx(wanted, rel=1e-10)
        for name, weight in right.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-10, atol=1e-12)


def test_held_out_losses_are_added_in_float64_and_keep_no_graph() -> None:
    cfg = config("model=toy_mlp", "parallel=none", "train.micro_batch_size=1")
    with assembled(cfg) as loop:
        token_loss, rows = build_token_loss(cfg, loop.setup.plan), corpus().held_out
        shares = [
            token_loss(loop.state.model, row, lambda _: nullcontext()) for row in eval_batches(rows, 99, 1)
        ]
        records: list[bool] = []
        loop.state.model.register_forward_pre_hook(lambda *_: records.append(torch.is_grad_enabled()))
        assert loop.evaluate() == sum(share.item() for share in shares) / (len(rows) * SEQ_LEN)
        assert records == [False] * len(rows)


def test_a_loss_that_is_not_finite_ends_a_loop_that_saves_nothing() -> None:
    with assembled(config("model=toy_mlp", "parallel=none", "train.log_every=2")) as loop:
        next(loop.state.model.parameters()).detach().fill_(torch.nan)
        with pytest.raises(NonfiniteError, match="train/loss is not finite at step 1"):
            next(loop.rows())


def test_after_an_evaluation_that_is_interrupted_the_model_trains_on() -> None:
    """Ctrl-C in a notebook."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with assembled(config("model=toy_mlp", "parallel=none")) as loop:
        loop.state.model.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            loop.evaluate()
        assert all(module.training for module in loop.state.model.modules())
