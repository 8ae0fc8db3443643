"""What a model does with shards is refused exactly where a rank would compute something else than one process: each op here is also
computed on whole numbers and on their halves, and what is found without numbers has to agree with that.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.assembled import planned, refusal
from support.composed import config
from support.nets import Routed, model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tpresearch import compile_plan
from tpresearch.config import ConfigError
from tpresearch.config.schema import Config
from tpresearch.models.toy_mlp import ToyLM, ToyMLP
from tpresearch.plan.compiler import Plan
from tpresearch.plan.describe import plan_text
from tpresearch.plan.one_rank import check_one_rank

Op = Callable[[Tensor], Tensor]
B, S, H = 2, 4, 16


OPS: dict[str, Op] = {}


class Mixer(nn.Module):
    """An op on the features that a layer has given."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(dim, width), nn.Linear(H, dim)

    def forward(self, x: Tensor) -> Tensor:
        features = self.in_proj(x)
        op = OPS.get("inner") or (lambda x: x.unflatten(-1, (-1, self.in_proj.out_features // H)).sum(-1))
        return self.out_proj(op(features))


class Outer(nn.Module):
    """One on the positions between the layers."""

    def forward(self, x: Tensor) -> Tensor:
        return OPS["outer"](x) if "outer" in OPS else x


class Mixing(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.set_submodule("mlp", Mixer(dim, hidden_dim))
        self.outer = Outer()

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return self.output(self.mlp(self.outer(self.embed(tokens))))


@functools.cache
def job(plan: str, width: int) -> tuple[nn.Module, Plan, Config]:
    words = (*model(Mixing), f"parallel={plan}", f"model.dim={H}", f"model.hidden_dim={width}")
    return *planned(*words, world=2), config(*words)


def refused(plan: str, width: int = H, **ops: Op) -> str | None:
    """Why a plan is refused for a model with these ops; None if it is not."""
    found = job(plan, width)
    OPS.update(ops)
    try:
        check_one_rank(*found[:2], torch.empty(B, S, dtype=torch.int64, device="meta"), found[2])
    except ConfigError as error:
        return str(error)
    finally:
        OPS.clear()
    return None


def is_apart(op: Op, width: int, dim: int) -> bool:
    """Whether halves along a dim give the halves of what the whole gives."""
    x = torch.rand(B, S, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1
    try:
        halves = torch.cat([op(half) for half in x.chunk(2, dim)], dim)
    except (RuntimeError, IndexError, ValueError):
        return False
    whole = op(x)
    return halves.shape == whole.shape and torch.allclose(halves, whole, rtol=1e-12)


ALONG: dict[str, Callable[[Tensor, int], Tensor]] = {
    "pointwise": lambda x, d: F.silu(2 * x + 0.5).clamp(max=1) * x.sigmoid(),
    "transposed": lambda x, d: x.transpose(1, 2).contiguous().relu().permute(0, 2, 1),
    "reshaped": lambda x, d: x.flatten(0, 1).exp().view_as(x),
    "softmax": lambda x, d: x.relu().softmax(d),
    "cumulated": lambda x, d: x.cumsum(d),
    "largest so far": lambda x, d: x.cummax(d)[0],
    "centered": lambda x, d: x - x.mean(d, keepdim=True),
    "centered over all": lambda x, d: x - x.mean(),
    "its norm": lambda x, d: x / x.norm(dim=d, keepdim=True),
    "normalized": lambda x, d: F.normalize(x, dim=d),
    "of the maximum": lambda x, d: x / x.amax(d, keepdim=True),
    "of variance": lambda x, d: x * x.var(d, keepdim=True),
    "sorted": lambda x, d: x.sort(d)[0],
    "flipped": lambda x, d: x.flip(d),
    "rolled": lambda x, d: x.roll(1, d),
    "padded": lambda x, d: torch.cat(
        [torch.zeros_like(x.narrow(d, 0, 1)), x.narrow(d, 0, x.shape[d] - 1)], d
    ),
    "reversed by index": lambda x, d: x.index_select(d, torch.arange(x.shape[d]).flip(0)),
    "gathered": lambda x, d: x.gather(d, x.argsort(d)),
    "numbered": lambda x, d: x.movedim(d, -1).mul(torch.arange(x.shape[d])).movedim(-1, d),
    "numbered from a ramp": lambda x, d: (
        x.movedim(d, -1).mul(torch.linspace(0, 1, x.shape[d])).movedim(-1, d)
    ),
    "numbered from a list": lambda x, d: (
        x.movedim(d, -1).mul(torch.tensor([float(i) for i in range(x.shape[d])])).movedim(-1, d)
    ),
    "numbered from a list of its own": lambda x, d: (
        x.movedim(d, -1).mul(x.new_tensor([*range(x.shape[d])])).movedim(-1, d)
    ),
    "by the root of its size": lambda x, d: x / torch.tensor(x.shape[d], dtype=x.dtype).sqrt(),
    "by its size, filled in": lambda x, d: x / x.new_full((), x.shape[d]),
    "numbered up to its size": lambda x, d: (
        x.movedim(d, -1).cumsum(1).mul(torch.linspace(1, x.shape[d], x.shape[3 - d])[:, None]).movedim(-1, d)
    ),
    "rolled by its size": lambda x, d: x.roll(3 * x.shape[d] // 8, 3 - d),
    "in a band as wide as it is": lambda x, d: x * torch.ones(8, 8).tril(1 - x.shape[d] // 2).sum(),
    "by a number of NumPy's": lambda x, d: x * torch.as_tensor(data=np.sqrt(np.array([[0.5]]))),
    "beside ones": lambda x, d: x + torch.ones(x.shape) * torch.zeros_like(x),
    "by ones added up": lambda x, d: x / torch.ones(x.shape).sum(d, keepdim=True),
    "by its size": lambda x, d: x / x.shape[d] ** 0.5,
    "a product with itself": lambda x, d: (x @ x.mT).softmax(-1) @ x,
    "a sum by einsum": lambda x, d: x * torch.einsum("bsh->bs" if d == 2 else "bsh->bh", x).unsqueeze(d),
    "its first": lambda x, d: x + x.narrow(d, 0, 1),
    "every second, twice": lambda x, d: x.unflatten(d, (-1, 2)).select(d + 1, 0).repeat_interleave(2, d),
    "halves added": lambda x, d: x.unflatten(d, (2, -1)).sum(d).repeat_interleave(2, d),
    "twice, the first half": lambda x, d: torch.cat([x, 2 * x], d).narrow(d, 0, x.shape[d]),
    "twice, halves added": lambda x, d: sum(torch.cat([x, 2 * x], d).chunk(2, d), torch.zeros(())),
    "padded in front": lambda x, d: F.pad(x.movedim(d, -1), (1, -1)).movedim(-1, d),
    "padded by a convolution": lambda x, d: F.conv1d(
        x.movedim(d, -1), torch.ones(x.shape[3 - d], 1, 1, dtype=x.dtype), padding=1, groups=x.shape[3 - d]
    )[..., : x.shape[d]].movedim(-1, d),
    "reversed by a list": lambda x, d: x.movedim(d, -1)[..., [*range(x.shape[d])][::-1]].movedim(-1, d),
    "without its first": lambda x, d: (
        x.movedim(d, 0).index_put((torch.tensor([0]),), x.new_zeros(())).movedim(0, d)
    ),
    "numbered by adding ones": lambda x, d: x * torch.ones_like(x).cumsum(d),
    "a share of each": lambda x, d: x * torch.zeros_like(x).softmax(d),
    "beside slices of ones": lambda x, d: x + torch.cat([torch.ones_like(x)] * 2, d).narrow(d, 0, x.shape[d]),
    "sorted along the last dim": lambda x, d: x.sort()[0] if d == 2 else x.mT.sort()[0].mT,
    "channels shuffled": lambda x, d: F.channel_shuffle(x.movedim(d, 1), 2).movedim(1, d),
    "by a row at its size": lambda x, d: x * torch.linspace(0, 1, 64, dtype=x.dtype)[x.shape[d]],
    "by a slice at its size": lambda x, d: (
        x * torch.linspace(0, 1, 64, dtype=x.dtype).narrow(0, x.shape[d], 1)
    ),
    "by the smallest but for its size": lambda x, d: (
        x * torch.linspace(0, 1, 64, dtype=x.dtype).kthvalue(x.shape[d])[0]
    ),
    "by what is padded to its size": lambda x, d: (
        x * (F.pad(torch.ones(4), (x.shape[d], 16 - x.shape[d])) * torch.linspace(0, 1, 20)).sum()
    ),
    "sorted along the other dim": lambda x, d: x.sort(stable=True, dim=3 - d)[0],
    "convolved": lambda x, d: F.conv1d(
        x.movedim(d, -1), torch.ones(x.shape[3 - d], 1, 3, dtype=x.dtype), padding=1, groups=x.shape[3 - d]
    ).movedim(-1, d),
    "joined with ones": lambda x, d: torch.cat([x, torch.ones_like(x)], d).unflatten(d, (2, -1)).sum(d),
    "filled in turn": lambda x, d: x.masked_scatter(x > 0.5, 2 * x),
    "of a norm at most": lambda x, d: x.renorm(2, 0, 0.5),
    "a triangle in place": lambda x, d: (2 * x).tril_(),
    "plus its diagonal": lambda x, d: x + x[..., :4].diagonal(dim1=1, dim2=2).unsqueeze(-1),
    "pooled": lambda x, d: (
        F.avg_pool1d(x if d == 2 else x.mT, 3, 1, 1).view(x.shape)
        if d == 2
        else F.avg_pool1d(x.mT, 3, 1, 1).mT
    ),
    "frequencies": lambda x, d: torch.fft.fft(x, dim=d).real,
    "layer norm": lambda x, d: (
        F.layer_norm(x, x.shape[2:]) if d == 2 else F.layer_norm(x.mT, x.shape[1:2]).mT
    ),
    "rms norm": lambda x, d: F.rms_norm(x, x.shape[2:]) if d == 2 else F.rms_norm(x.mT, x.shape[1:2]).mT,
    "group norm": lambda x, d: (
        F.group_norm(x if d == 1 else x.mT, 2).view(x.shape) if d == 1 else F.group_norm(x.mT, 2).mT
    ),
    "along the other dim": lambda x, d: (
        x.softmax(3 - d).cumsum(3 - d).roll(1, 3 - d) - x.mean(3 - d, keepdim=True)
    ),
    "attention by itself": lambda x, d: F.scaled_dot_product_attention(x, x, x),
    "masked": lambda x, d: x.masked_fill(x > 0.5, 0.0).where(x > 0.2, torch.tensor(0.1, dtype=x.dtype)),
    "triangle": lambda x, d: x.tril(),
}


@pytest.mark.parametrize("name", ALONG)
@pytest.mark.parametrize("dim", [2, 1])
def test_an_op_on_a_shard_is_refused_unless_shards_give_shards(dim: int, name: str) -> None:
    def op(x: Tensor) -> Tensor:
        return ALONG[name](x, dim)

    why = refused("tp", inner=op) if dim == 2 else refused("sp", outer=op)
    assert (why is None) == is_apart(op, H, dim), why


@pytest.mark.parametrize(
    ("width", "op"),
    [
        (2 * H, lambda x: x[..., ::2]),
        (2 * H, lambda x: x[..., 1::2]),
        (3 * H, lambda x: x[..., 8:40:2]),
        (H, lambda x: torch.cat([x] * 3, -1)[..., ::3]),
    ],
)
def test_every_second_feature_is_refused_unless_a_rank_has_its_own(width: int, op: Op) -> None:
    why = refused("tp", width, inner=op)
    assert (why is None) == is_apart(op, width, 2), why


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def heads(x: Tensor, size: int = 4) -> Tensor:
    return x.unflatten(-1, (-1, size)).transpose(1, 2)


QUERIES_KEYS_VALUES: dict[str, Op] = {
    "thirds": lambda x: attend(*map(heads, x.chunk(3, -1))),
    "a third of each head": lambda x: attend(*x.unflatten(-1, (-1, 3, 4)).transpose(1, 2).unbind(3)),
    "a third of each head, chunked": lambda x: attend(*heads(x, 12).chunk(3, -1)),
    "a third of each head, last": lambda x: attend(*x.unflatten(-1, (-1, 4, 3)).transpose(1, 2).unbind(-1)),
    "thirds of as many heads as there are": lambda x: attend(
        *x.unflatten(-1, (3, -1, 4)).permute(2, 0, 3, 1, 4)
    ),
    "thirds of four heads": lambda x: attend(*x.unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)),
    "four heads": lambda x: attend(*x.unflatten(-1, (4, 3, -1)).transpose(1, 2).unbind(3)),
    "one head": lambda x: attend(*x.unflatten(-1, (1, -1)).transpose(1, 2).chunk(3, -1)),
}


@pytest.mark.parametrize("name", QUERIES_KEYS_VALUES)
def test_fused_queries_keys_and_values_are_refused_unless_a_shard_has_whole_heads(name: str) -> None:
    op = QUERIES_KEYS_VALUES[name]
    why = refused("tp", 3 * H, inner=op)
    assert (why is None) == is_apart(op, 3 * H, 2), why


def slopes(count: int) -> Tensor:
    return 0.5 ** torch.arange(1, count + 1)[:, None, None]


HEADS: dict[str, Callable[[Tensor], Tensor]] = {
    "as many as fit": lambda x: attend(x, x, x),
    "with slopes of its own heads": lambda x: attend(x, x * slopes(x.shape[1]), x),
    "with slopes of all heads": lambda x: attend(x, x * slopes(4), x),
    "mixed by a softmax": lambda x: attend(x, x.softmax(1), x),
    "centered over heads": lambda x: attend(x - x.mean(1, keepdim=True), x, x),
    "queries in groups": lambda x: attend(x, *(x[:, ::2].repeat_interleave(2, 1),) * 2),
    "queries in groups, by torch": lambda x: (
        F.scaled_dot_product_attention(x, *(x[:, ::2],) * 2, enable_gqa=True).transpose(1, 2).flatten(2)
    ),
    "queries in turn": lambda x: attend(x, *(x[:, ::2].repeat(1, 2, 1, 1),) * 2),
    "queries in expanded groups": lambda x: attend(
        x, *(x[:, ::2, None].expand(-1, -1, 2, -1, -1).flatten(1, 2),) * 2
    ),
    "queries in turn, expanded": lambda x: attend(
        x, *(x[:, None, ::2].expand(-1, 2, -1, -1, -1).flatten(1, 2),) * 2
    ),
    "features before heads": lambda x: x.permute(0, 2, 3, 1).flatten(2),
    "each normalized": lambda x: attend(F.rms_norm(x, x.shape[-1:]), F.normalize(x, dim=-1), x),
    "linear attention": lambda x: (x.softmax(-1) @ (x.softmax(2).mT @ x)).transpose(1, 2).flatten(2),
    "scores by einsum": lambda x: torch.einsum(
        "bhqk,bhkd->bqhd", torch.einsum("bhqd,bhkd->bhqk", x, x).tril(), x
    ).flatten(2),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_are_refused_unless_each_rank_has_its_own(name: str) -> None:
    def op(x: Tensor) -> Tensor:
        return HEADS[name](heads(x))

    why = refused("tp", inner=op)
    assert (why is None) == is_apart(op, H, 2), why


@pytest.mark.parametrize(("size", "is_followed"), [(H // 4, True), (H // 2, False)])
def test_the_line_is_named_from_which_on_a_rank_calls_other_functions(
    monkeypatch: pytest.MonkeyPatch, size: int, is_followed: bool
) -> None:
    """einsum permutes to other dims where a rank has a single head."""
    monkeypatch.setitem(OPS, "inner", lambda x: HEADS["scores by einsum"](heads(x, size)))
    words = (*model(Mixing), "parallel=tp", f"model.dim={H}", f"model.hidden_dim={H}")
    _, plan = planned(*words, world=2)
    assert ("test_one_rank.py, line" in str(plan.followed_to)) != is_followed


def test_what_is_not_checked_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "inner", lambda x: HEADS["scores by einsum"](heads(x, H // 2)))
    narrow = (*model(Mixing), "parallel=tp", f"model.dim={H}", f"model.hidden_dim={H}")
    for words, said in (
        (narrow, "calls other functions than one process, and is not checked from there on"),
        ((*model(Routed), "parallel=tp"), "forward depends on values, and that of a rank is not checked"),
    ):
        (note,) = compile_plan(config(*words), world_size=2).job.notes
        assert said in note
    assert compile_plan(config(*model(Routed), "parallel=none")).job.notes == ()


def test_a_refusal_names_the_layer_the_op_and_what_to_write() -> None:
    assert (why := refused("tp", inner=lambda x: x.softmax(-1)))
    assert why.startswith(
        "model.plans.tp.in_proj.dst=shard:-1: softmax needs all features of the output of mlp.in_proj"
    )
    assert (why := refused("sp", outer=lambda x: F.pad(x[:, :-1], (0, 0, 1, 0))))
    assert why.startswith(
        "model.plans.sp.embed.dst=shard:1: slice in outer needs all positions of the output of embed"
    )
    assert (why := refused("tp", inner=lambda x: HEADS["with slopes of its own heads"](heads(x))))
    assert "arange in mlp has as many elements as a tensor has there" in why
    assert (why := refused("tp", 3 * H, inner=QUERIES_KEYS_VALUES["thirds of as many heads as there are"]))
    assert (
        "view in mlp makes 2x4x3x4x4 of the output of mlp.in_proj, and of one of 2 ranks' shards 2x4x3x2x4"
        in why
    )
    assert (why := refused("tp", inner=lambda x: x.view(B, S, H)))
    assert "it runs whole, but on a rank's shards ends at" in why
    assert "test_one_rank.py" in why


def test_what_a_refusal_says_of_ones_and_of_elements_apart() -> None:
    assert (why := refused("tp", inner=lambda x: x / torch.ones(x.shape).sum(-1, keepdim=True)))
    assert "sum in mlp works along a dim with as many elements as a rank's shard has" in why
    assert (why := refused("tp", inner=lambda x: torch.cat([x[..., ::2]] * 2, -1)))
    assert "has elements of the output of mlp.in_proj that lie apart from each other on one rank" in why


def test_a_gathered_input_is_whole_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPS, "outer", lambda x: x.cumsum(1))
    words = (*model(Mixing), "parallel=sp", f"model.hidden_dim={H}")
    assert "needs all positions" in str(refusal(*words))
    planned(*words, "+model.plans.sp.outer={match: outer, style: input, src: ['shard:1'], dst: [replicate]}")


def test_an_output_is_in_the_layout_that_a_rule_gives_it() -> None:
    def words(src: str, dst: str) -> list[str]:
        rule = f"{{match: outer, style: output, src: ['{src}'], dst: ['{dst}']}}"
        return [*model(Mixing), "parallel=sp", f"model.hidden_dim={H}", f"+model.plans.sp.outer={rule}"]

    whole = "model.plans.sp.embed.dst=replicate"
    _, plan = planned(*words("replicate", "shard:1"), whole)
    assert plan.followed_to is None
    said = "the output of outer is a shard of the output of embed along dim 1; shard:1"
    assert said in str(refusal(*words("replicate", "shard:1")))
    said = "the output of outer is whole on each rank; replicate"
    assert said in str(refusal(*words("shard:1", "shard:1"), whole))
    said = "the input of mlp.in_proj is whole on each rank; replicate"
    assert said in str(refusal(*words("shard:1", "replicate")))


class Weighed(ToyLM):
    """With a factor of its own for each entry of the vocabulary."""

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return self.output(self.mlp(self.embed(tokens))) * torch.ones(self.output.out_features)


def test_logits_that_stay_sharded_meet_no_plain_tensor() -> None:
    assert "mul takes a DTensor, which a sharding rule leaves there, and a plain tensor" in str(
        refusal(*model(Weighed), "parallel=tp")
    )
    planned(*model(Weighed), "parallel=tp", "model.plans.tp.output.dst=replicate")


class OneKeyForAll(ToyLM):
    """Attention whose heads have one key and value in common."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.key = nn.Linear(dim, 4)

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return self.output(self.attended(self.embed(tokens)))

    def attended(self, x: Tensor) -> Tensor:
        q, k = heads(self.mlp.in_proj(x)), self.key(x).unsqueeze(1)
        return self.mlp.out_proj(attend(q, k, k))


class Scaled(ToyLM):
    """A factor of its own for all features."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.set_submodule("mlp.relu", Factor())


class Factor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x


class Shifted(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.set_submodule("mlp.relu", Shift())


class Shift(Factor):
    def forward(self, x: Tensor) -> Tensor:
        return self.weight * torch.ones_like(x) + x


def test_what_is_whole_and_meets_a_shard_has_a_partial_gradient() -> None:
    error = refusal(*model(OneKeyForAll), "parallel=tp")
    assert str(error).startswith(
        "model.plans.tp=tp: what key has given is whole on each rank and meets the size of a shard (expand"
    )
    assert "CopyToShards" in error.legal
    gathers = "+model.plans.tp.key={match: key, style: colwise, dst: replicate}"
    assert "what key has given" in str(refusal(*model(OneKeyForAll), "parallel=tp", gathers))
    error = refusal(*model(Scaled), "parallel=tp")
    assert (
        "a parameter of mlp.relu is whole on each rank and meets a shard of the output of mlp.in_proj"
        in str(error)
    )
    (key, rule), *_ = error.fix.items()
    planned(*model(Scaled), "parallel=tp", f"{key}={rule}")
    error = refusal(*model(Shifted), "parallel=tp")
    assert "a parameter of mlp.relu is whole on each rank and meets the size of a shard" in str(error)
    planned(*model(Shifted), "parallel=tp", f"{key}={rule}")


class KeptShort(OneKeyForAll):
    """The same, in a checkpoint of its own."""

    def attended(self, x: Tensor) -> Tensor:
        return checkpoint(super().attended, x, use_reentrant=True)


class WithoutGradient(ToyLM):
    """In a checkpoint that would need an input with a gradient."""

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return checkpoint(super().forward, tokens, use_reentrant=True)


def test_what_runs_in_a_reentrant_checkpoint_is_checked_as_elsewhere() -> None:
    assert "what key has given is whole on each rank" in str(refusal(*model(KeptShort), "parallel=tp"))
    assert "no gradient flows back" in str(refusal(*model(WithoutGradient), "parallel=none"))


class Skipping(ToyLM):
    """Hidden features with the embedding's behind them, as in the second half of a U."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.join = nn.Linear(hidden_dim + dim, dim)

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        x = self.embed(tokens)
        return self.output(self.join(torch.cat([self.mlp.in_proj(x), x], -1)))


def test_of_what_is_joined_to_a_shard_the_first_thing_said_is_that_features_are_missing() -> None:
    error = refusal(*model(Skipping), "parallel=tp", "model.plans.tp.out_proj.match=join")
    assert str(error).startswith(
        "model.plans.tp.in_proj.dst=shard:-1: cat needs all features of the output of mlp.in_proj"
    )


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        (
            "tp.in_proj.src=shard:1",
            "model.plans.tp.in_proj.src=shard:1: the input of mlp.in_proj is whole on each rank; replicate",
        ),
        (
            "sp.in_proj.src=replicate",
            "model.plans.sp.in_proj.src=replicate: the input of mlp.in_proj is a shard of the output of embed along dim 1; shard:1",
        ),
        (
            "tp.in_proj.dst=replicate",
            "model.plans.tp.out_proj.src=shard:-1: the input of mlp.out_proj is whole on each rank; replicate",
        ),
        (
            "tp.output.dst=shard:-1",
            "model.plans.tp.output.dst=shard:-1: the model's output is a shard of that of output, and the loss needs all of it",
        ),
    ],
)
def test_a_layout_that_a_tensor_does_not_have_is_refused(words: str, refused: str) -> None:
    plan = words.partition(".")[0]
    error = refusal("model=toy_mlp", f"parallel={plan}", f"model.plans.{words}")
    assert str(error).startswith(refused)


def test_the_layout_that_a_tensor_has_is_proposed() -> None:
    words = (*model(Mixing), "parallel=tp")
    whole = refusal(*words, "model.plans.tp.in_proj.dst=replicate")
    assert whole.fix == {"model.plans.tp.out_proj.src": "replicate"}
    planned(*words, "model.plans.tp.in_proj.dst=replicate", "model.plans.tp.out_proj.src=replicate")
    a_norm = "+model.plans.tp.inner={match: mlp.relu, style: sequence}"
    of_heads = refusal(*model(Scaled), "parallel=tp", a_norm)
    assert of_heads.legal == "shard:2"
    typed = [f"{key}={layout}" for key, layout in of_heads.fix.items()]
    assert typed == ["+model.plans.tp.inner.src=shard:2", "+model.plans.tp.inner.dst=shard:2"]
    planned(*model(Scaled), "parallel=tp", a_norm, *typed)


def test_of_a_layer_with_a_whole_input_style_sequence_is_not_corrected_by_a_layout_that_it_cannot_have() -> (
    None
):
    error = refusal("model=toy_mlp", "parallel=tp", "+model.plans.tp.mlp={match: mlp, style: sequence}")
    assert str(error).endswith(
        "is whole on each rank; a layer with a whole input takes style input, with src and dst [null]"
    )


class Numbered(ToyMLP):
    """The second one does what no shard allows."""

    def __init__(self, dim: int, hidden_dim: int, out_dim: int, number: int) -> None:
        super().__init__(dim, hidden_dim, out_dim)
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.in_proj(x)
        return x + self.out_proj(hidden.softmax(-1) if self.number == 1 else hidden.relu())


class Deep(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int, numbers: list[int]) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        blocks = (Numbered(dim, hidden_dim, dim, number) for number in numbers)
        self.set_submodule("mlp", nn.Sequential(*blocks))


def test_a_block_that_differs_from_the_others_is_followed_too() -> None:
    rules = [f"model.plans.tp.{name}.match=mlp.*.{name}" for name in ("in_proj", "out_proj")]
    words = (*model(Deep), "parallel=tp", "model.blocks=[mlp.*]", *rules)
    planned(*words, "+model.numbers=[0,0,0,2]")
    assert "output of mlp.2.in_proj" in str(refusal(*words, "+model.numbers=[0,0,1,0]"))


ACROSS_ROWS: dict[str, Op | None] = {
    "mean in outer": lambda x: x - x.mean(),
    "cumsum in outer": lambda x: x.flatten(0, 1).cumsum(0).view_as(x),
    "div in outer": lambda x: x / x.shape[0],
    "native_batch_norm in outer": lambda x: F.batch_norm(x.mT, None, None, training=True).mT,
    "view in outer": lambda x: x.view(x.shape[1], -1, x.shape[2]).view(x.shape),
    "add in outer": lambda x: (x.repeat(2, 1, 1) + x.repeat_interleave(2, 0)).unflatten(0, (2, -1)).mean(0),
    "": lambda x: attend(*(heads(x.cumsum(1).softmax(-1)),) * 3),
}


@pytest.mark.parametrize("said", ACROSS_ROWS)
def test_an_op_across_the_rows_of_a_batch_is_noted(monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setitem(OPS, "outer", ACROSS_ROWS[said])
    words = (*model(Mixing), f"model.hidden_dim={H}", f"model.dim={H}")
    split = [("parallel=ddp",), ("parallel=none", "train.micro_batch_size=2")]
    assert [planned(*words, *how)[1].across_rows for how in split] == [said or None] * 2
    _, whole = planned(*words, "parallel=none")
    assert whole.across_rows is None
    assert ("works across them" in plan_text(*planned(*words, "parallel=fsdp"))) == bool(said)


def test_a_forward_that_goes_another_way_with_more_rows_is_not_followed_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(OPS, "outer", lambda x: x.exp() if len(x) > 2 else x - x.mean())
    words = (*model(Mixing), f"model.hidden_dim={H}", f"model.dim={H}", "parallel=none")
    assert planned(*words, "train.micro_batch_size=2")[1].across_rows is None


class Table(ToyLM):
    """With a table of its own, and two blocks that are alike."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.table = nn.Parameter(torch.empty(vocab_size, dim))
        blocks = (Numbered(dim, hidden_dim, dim, 0) for _ in range(2))
        self.set_submodule("mlp", nn.Sequential(*blocks))
        del self.embed

    def reset_parameters(self) -> None:
        nn.init.normal_(self.table)

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        x = F.embedding(tokens, self.table)
        for block in self.mlp.children():
            x = block(x=x)
        return self.output(x.tanh())


def test_a_block_like_one_before_is_followed_where_its_input_is_another() -> None:
    """Of the second one's, it is known which layer has given it."""
    rules = [f"model.plans.tp.{name}.match=mlp.*.{name}" for name in ("in_proj", "out_proj")]
    words = (*model(Table), "parallel=tp", "model.blocks=[mlp.*]", "~model.plans.tp.embed", *rules)
    assert planned(*words)[1].followed_to is None
