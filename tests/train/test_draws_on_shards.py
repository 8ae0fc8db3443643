"""What functions of a model's own draw, such as dropout in attention: apart on shards and between replicas of the data, alike on
what tensor-parallel ranks have whole, and the same when recomputed.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.assembled import assembled, refusal
from support.composed import config
from support.marks import exhaustive, on_card
from support.nets import model
from torch import Tensor, nn

from tpresearch.config import Config, ConfigError
from tpresearch.config.world import World
from tpresearch.models.toy_mlp import ToyLM, ToyMLP
from tpresearch.train.randomness import DrawsOnShards
from tpresearch.verify.ranks import Ranks

PLACES = ("attention", "heads", "made by hand", "residual")
"""Where the model below draws: on three tensors that tensor parallelism splits, and on one that sp splits too."""
DEVICES = pytest.mark.parametrize("device", ["cpu", on_card("cuda")])


class Attention(ToyMLP):
    """In the places that its plan has rules for: uniform attention over values of one, and what it drops."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int) -> None:
        super().__init__(dim, hidden_dim, out_dim)
        self.drawn: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.in_proj(x)
        heads = hidden.unflatten(-1, (-1, 4)).transpose(1, 2)  # [b, heads, s, h]
        zero, rate = torch.zeros_like(heads), 0.5 * self.training
        attention = F.scaled_dot_product_attention(zero, zero, zero + 1, dropout_p=rate)
        dropped = F.dropout(heads, 0.5, self.training)
        noise = torch.rand(*heads.shape, device=heads.device) if self.training else zero
        out = self.out_proj((attention * dropped + noise).transpose(1, 2).flatten(-2))
        residual = F.dropout(out, 0.5, self.training)
        if self.training and len(self.drawn) < len(PLACES):
            self.drawn = [t.detach() for t in (attention, dropped == 0, noise, residual == 0)]
        return residual


class Attending(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.mlp = Attention(dim, hidden_dim, dim)


class Reusing(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.set_submodule("mlp.relu", nn.Dropout(0.5))

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return self.output(self.mlp.relu(self.mlp(self.embed(tokens))))


def drawn(world: World, cfg: Config) -> tuple[list[float], list[Tensor]]:
    """Loss and norm of two steps, and what was drawn first."""
    with assembled(cfg, world) as loop:
        numbers = [number.item() for _ in range(2) for number in loop.step()]
        attention = loop.state.model.get_submodule("mlp")
        assert isinstance(attention, Attention)
        return numbers, [mask.cpu() for mask in attention.drawn]


@pytest.mark.parametrize(
    ("plan", "size", "tp"),
    [
        ("tp", 2, 2),
        exhaustive("sp", 2, 2),
        exhaustive("fsdp", 2, 1),
        ("fsdp_tp", 4, 2),
        exhaustive("hsdp_tp", 8, 2),
    ],
)
@DEVICES
def test_ranks_draw_apart_on_what_they_alone_have(
    ranks: Ranks, device: str, plan: str, size: int, tp: int
) -> None:
    cfg = config(*model(Attending), f"parallel={plan}", f"device={device}")
    found = [masks for _, masks in ranks.run(size, drawn, cfg)]
    for other in range(1, size):
        replica_of_first = other < tp
        alike = [
            place for place, a, b in zip(PLACES, found[0], found[other], strict=True) if torch.equal(a, b)
        ]
        assert alike == (["residual"] if replica_of_first and plan == "tp" else [])


@pytest.mark.parametrize("kind", ["full", exhaustive("selective")])
@DEVICES
def test_they_draw_the_same_when_recomputed(ranks: Ranks, device: str, kind: str) -> None:
    settings = (*model(Attending), "parallel=tp", "train.dtype=float64", f"device={device}")
    again = config(*settings, f"parallel.activation_checkpointing={kind}")
    plain = [numbers for numbers, _ in ranks.run(2, drawn, config(*settings))]
    assert [numbers for numbers, _ in ranks.run(2, drawn, again)] == [
        pytest.approx(numbers, rel=1e-12) for numbers in plain
    ]


def test_a_generator_of_its_own_is_refused_on_a_shard() -> None:
    x, own = torch.ones(4), torch.Generator()
    with DrawsOnShards({"": {"bernoulli": [4, 8]}}, (1,)):
        x.bernoulli(generator=own)  # whole
        with pytest.raises(ConfigError, match="bernoulli draws by a generator of its own"):
            x.bernoulli(generator=own)


def test_a_dropout_that_is_used_twice_is_not_compiled_for_shards() -> None:
    error = refusal(*model(Reusing), "parallel.compile=true", "parallel=tp", "train.loss_chunk=null")
    assert str(error).startswith("parallel.compile=true: mlp.relu is called more than once")
