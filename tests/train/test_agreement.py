"""A parameter without a rule that acts on heads of a rank's own: refused in the first step, and right by a rule that sums. And rows that
lead ranks to different parameters."""

from __future__ import annotations

import random
from unittest.mock import Mock

import pytest
import torch
from support.assembled import joined
from support.composed import SMALL, config, corpus
from support.nets import Routed as Experts
from support.nets import model
from support.odd_nets import Asking
from support.traces import agree
from torch import Tensor, nn

import tpresearch
from tpresearch.config import Config, ConfigError
from tpresearch.config.world import World
from tpresearch.models.toy_mlp import ToyLM, ToyMLP
from tpresearch.train.agreement import AgreedGradients, _sample
from tpresearch.train.assemble import assemble
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.trace import RunTrace, trace_run

OWN = (
    "~model.plans.tp.in_proj",
    "+model.plans.tp.own={match: mlp.in_proj, _target_: torch.distributed.tensor.parallel.ColwiseParallel}",
)
"""A style of one's own, of whose output nothing is known before the first step."""
RULE = "+model.plans.tp.norm={match: mlp.norm, style: sequence, src: 'shard:2', dst: 'shard:2'}"


class Normed(ToyMLP):
    """A norm of each head, as of queries and keys."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(dim, hidden_dim, out_dim)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.norm(self.in_proj(x).unflatten(-1, (-1, 8))).flatten(-2))


class NormedHeads(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.mlp = Normed(dim, hidden_dim, dim)


class Zero(nn.Linear):
    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class NormedHeadsFromZeros(NormedHeads):
    """Whose last two layers start from zeros, so that the first two steps have no gradient before them."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.set_submodule("mlp.out_proj", Zero(hidden_dim, dim))
        self.set_submodule("output", Zero(dim, vocab_size))

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        x = self.embed(tokens)
        return self.output(x + self.mlp(x))


class Gated(ToyMLP):
    """One gate for all features: it is whole, and meets a shard. The gradients of the norm before it differ too."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(dim, hidden_dim, out_dim)
        self.norm, self.gate = nn.LayerNorm(dim), nn.Linear(dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.out_proj(self.in_proj(x) * self.gate(x))


class GatedFeatures(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.mlp = Gated(dim, hidden_dim, dim)


class Routed(ToyMLP):
    """With a second pair of matmuls, for rows of which a number is positive."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(dim, hidden_dim, out_dim)
        self.other = ToyMLP(dim, hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x) if x[0, 0, 0] > 0 else super().forward(x)


class RoutedRows(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.mlp = Routed(dim, hidden_dim, dim)


class Forked(ToyLM):
    """With a second block of another size, for rows of which a number is positive."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.wide = ToyMLP(dim, 2 * hidden_dim, dim)

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        x = self.embed(tokens)
        return self.output(self.wide(x) if x[0, 0, 0] > 0 else self.mlp(x))


class LeftOutByChance(ToyLM):
    """With a block that ranks leave out apart, as the seeds of their rows have it."""

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        x = self.embed(tokens)
        return self.output(x + self.mlp(x) if random.random() < 0.5 else x)


def first_step(world: World, cfg: Config, steps: int = 1) -> str:
    """What it is refused for, if it is, or one of the next."""
    with joined(cfg, world) as (job, mesh, device):
        loop = assemble(job, mesh, device, corpus(), [AgreedGradients(cfg, job.plan, mesh)])
        try:
            for _ in range(steps):
                loop.step()
        except ConfigError as error:
            return str(error)
    return ""


def first_step_in_python(world: World, words: list[str]) -> str:
    with pytest.raises(ConfigError) as refused:
        tpresearch.build(tpresearch.load(*words)).step()
    return str(refused.value)


def trace(world: World, cfg: Config) -> RunTrace:
    return trace_run(cfg, corpus(), world, 2)


@pytest.mark.parametrize(("rules", "refused"), [(OWN, True), ((RULE,), False)], ids=["no rule", "a rule"])
def test_a_partial_gradient_of_what_is_replicated_is_refused(
    ranks: Ranks, rules: tuple[str, ...], refused: bool
) -> None:
    cfg = config(*model(NormedHeads), "parallel=tp", "train.dtype=float64", *rules)
    for found in ranks.run(2, first_step, cfg):
        assert found.startswith("model.plans.tp=tp: the gradient of mlp.norm.weight differs") is refused
    if not refused:
        settings = (*model(NormedHeads), "train.dtype=float64", "train.clip_grad_norm=0.2", *rules)
        alone = trace(World(), config(*settings, "parallel=none"))
        agree(ranks.run(2, trace, config(*settings, "parallel=tp"))[0], alone)


def test_a_gradient_is_compared_once_it_is_not_zero(ranks: Ranks) -> None:
    for found in ranks.run(2, first_step, config(*model(NormedHeadsFromZeros), "parallel=tp", *OWN), 5):
        assert found.startswith("model.plans.tp=tp: the gradient of mlp.norm.weight differs")


def test_a_whole_output_that_meets_a_shard_is_named_with_the_style_for_it(ranks: Ranks) -> None:
    words = [*SMALL, *model(GatedFeatures), "data=random_tokens", "parallel=tp", *OWN]
    for found in ranks.run(2, first_step_in_python, words):
        assert found.startswith("model.plans.tp=tp: the gradient of mlp.gate.weight differs")
        assert "as CopyToShards in docs/plans.md" in found


def test_what_a_style_of_ones_own_shards_is_not_taken_for_replicated(ranks: Ranks) -> None:
    assert ranks.run(2, first_step, config("model=toy_mlp", "parallel=tp", *OWN)) == ["", ""]


@pytest.mark.parametrize(
    ("net", "refused"),
    [
        (RoutedRows, "mlp.in_proj.weight has a gradient on some ranks alone"),
        (
            Forked,
            "some ranks, whose rows led the forward elsewhere, gather wide, where others gather mlp; ddp",
        ),
        (LeftOutByChance, "some ranks, whose rows led the forward elsewhere, gather "),
        (
            Experts,
            "some ranks, whose rows led the forward to more parameters, sum gradients of the model of ",
        ),
        (Asking, ""),
    ],
)
def test_ranks_whose_rows_led_to_different_parameters_are_refused(
    ranks: Ranks, net: type[nn.Module], refused: str
) -> None:
    """FSDP would sum the gradients of one with those of another, without a word; or end in gloo's, where sizes differ."""
    settings = ("parallel=fsdp", "train.micro_batch_size=2", "train.loss_chunk=null")
    blocks = ["model.blocks=[mlp,wide]"] if net is Forked else []
    for found in ranks.run(2, first_step, config(*model(net), *settings, *blocks), 4):
        assert found.startswith(f"parallel=fsdp: {refused}") if refused else not found


def test_the_first_steps_are_compared_but_for_the_one_that_the_ledger_counts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    for words, begun, compared in (("", 0, [0, 2, 3, 4]), ("", 6, [6, 8, 9, 10]), ("train.steps=1", 0, [])):
        at: list[int] = []
        plan, state = Mock(rules={"any": 1}, replicated=["w"]), Mock(step=begun)
        watching = AgreedGradients(config("model=toy_mlp", *words.split()), plan, Mock())
        monkeypatch.setattr(watching, "_compare", lambda _, at=at, state=state: at.append(state.step))
        state.trained_parameters.return_value = {"w": parameter}
        watching.start(state)
        for state.step in range(begun, begun + (1 if words else 9)):
            watching.gradients(state)
        assert at == compared


def test_a_sample_is_of_all_of_a_gradient() -> None:
    assert _sample(torch.arange(4097)).tolist() == list(range(0, 4096, 4))
    assert _sample(torch.arange(3, dtype=torch.bfloat16)).dtype == torch.float32
