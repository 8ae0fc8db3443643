"""Initial weights: their distribution, and that seed, name and place alone decide each of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from support.composed import config
from support.marks import exhaustive
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from tpresearch.config import ConfigError
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.models.llama2 import Llama2
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.mesh import build_mesh
from tpresearch.parallel.weights import (
    TILE,
    TILE_COLUMNS,
    from_seed,
    held_indices,
    materialize,
    tile_shape,
    tile_slices,
)
from tpresearch.plan.initializers import ElementwiseInitializer, ModuleInitializer, read_initializers
from tpresearch.plan.meta import meta_model
from tpresearch.train.preflight import plan_model
from tpresearch.verify.ranks import Ranks

CPU = torch.device("cpu")


def drawn(model: nn.Module, seed: int = 0, threads: int | None = None) -> dict[str, Tensor]:
    """The initial weights of a plain model, by name."""
    materialize(model, CPU, from_seed(read_initializers(model), seed, threads))
    return dict(model.state_dict())


def llama() -> Llama2:
    with torch.device("meta"):
        return Llama2(
            vocab_size=263, max_seq_len=8, dim=576, n_layers=2, n_heads=8, n_kv_heads=8, ffn_dim=1200
        )


def test_llamas_matrices_are_normal_and_clamped_at_three_std() -> None:
    weights = drawn(llama())
    for name, weight in weights.items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones(576)), name
            continue
        std = 0.02 / math.sqrt(4) if re.search("wo|w2", name) else 0.02
        error = 1 / math.sqrt(weight.numel())
        assert abs(weight.mean()) < 4 * std * error, name
        left_by_the_clamp = 0.99831 * std
        assert weight.std() == pytest.approx(left_by_the_clamp, rel=4 * error), name
        clamped = torch.tensor(3 * std)
        assert weight.max() == clamped, name
        assert weight.min() == -clamped, name
        assert (weight.abs() == clamped).float().mean() == pytest.approx(0.0027, rel=0.25), name
    w1 = weights["layers.0.feed_forward.w1.weight"].flatten()
    quantiles = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]) * 0.02
    shares = torch.stack([(w1 < q).double().mean() for q in quantiles])
    torch.testing.assert_close(shares, torch.special.ndtr(quantiles.double() / 0.02), atol=0.002, rtol=0)


def test_torchs_layers_start_as_torch_has_them() -> None:
    model = nn.Sequential(nn.Linear(600, 300), nn.Embedding(300, 600, padding_idx=130), nn.LayerNorm(600))
    weights = drawn(model)
    bound = 1 / math.sqrt(600)
    for name in ("0.weight", "0.bias"):
        assert weights[name].abs().max() <= bound
        assert weights[name].std() == pytest.approx(bound / math.sqrt(3), rel=0.005 if "w" in name else 0.1)
    rows = weights["1.weight"].norm(dim=1) / math.sqrt(600)
    assert rows[130] == 0.0
    torch.testing.assert_close(torch.cat((rows[:130], rows[131:])), torch.ones(299), atol=0.15, rtol=0)
    assert torch.equal(weights["2.weight"], torch.ones(600))
    assert torch.equal(weights["2.bias"], torch.zeros(600))


def test_seed_and_name_and_tile_decide_a_weight() -> None:
    first = drawn(llama())
    again, other = drawn(llama(), threads=1), drawn(llama(), seed=1)
    matrices = [name for name in first if "norm" not in name]
    assert all(torch.equal(first[name], again[name]) for name in first)
    samples = [first[name][:128, :512].flatten() for name in matrices]
    samples += [other[name][:128, :512].flatten() for name in matrices]
    w1 = first["layers.0.feed_forward.w1.weight"]
    samples += [w1[:128, 64:576].flatten(), *w1[128:1152, :512].reshape(8, -1)]
    del samples[-9]  # overlaps the first tile of w1
    correlation = torch.corrcoef(torch.stack(samples)) - torch.eye(len(samples))
    assert correlation.abs().max() < 5 / math.sqrt(128 * 512)


def test_a_draw_that_fails_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise MemoryError

    layer = nn.Linear(3, 2)
    source = from_seed(read_initializers(layer), 0)
    monkeypatch.setattr(ElementwiseInitializer, "draw", fail)
    with pytest.raises(MemoryError):
        source(layer)


def test_a_layer_put_in_later_starts_as_the_one_that_it_replaces() -> None:
    """As a low-precision layer does: a subclass of nn.Linear, whose own start is uniform and wider."""

    class Swapped(nn.Linear):
        pass

    model, plain = llama(), drawn(llama())
    initializers = read_initializers(model)
    with torch.device("meta"):
        model.set_submodule("layers.0.attention.wo", Swapped(576, 576, bias=False))
    materialize(model, CPU, from_seed(initializers, 0))
    wo = model.get_parameter("layers.0.attention.wo.weight").detach()
    assert wo.std() == pytest.approx(0.02 / math.sqrt(4), rel=0.005)
    assert torch.equal(wo, plain["layers.0.attention.wo.weight"])


def test_float64_weights_are_the_float32_ones() -> None:
    narrow, wide = drawn(llama()), drawn(llama().double())
    assert all(torch.equal(wide[name], weight.double()) for name, weight in narrow.items())


class Own(nn.Module):
    """Two matrices and a vector of one module, started by a function."""

    def __init__(self, reset: Callable[[Own], object]) -> None:
        super().__init__()
        self.reset = reset
        self.a = nn.Parameter(torch.empty(200, 700))
        self.b = nn.Parameter(torch.empty(3, 140, 530))
        self.c = nn.Parameter(torch.empty(9))

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.b)
        nn.init.constant_(self.c, 2.0)
        self.reset(self)


def test_in_place_calls_are_drawn_by_tiles() -> None:
    model = Own(lambda own: (nn.init.xavier_uniform_(own.a), own.a.data.mul_(2.0).add_(1.0)))
    assert all(isinstance(start, ElementwiseInitializer) for start in read_initializers(model).values())
    a, bound = drawn(model)["a"], 2 * math.sqrt(6 / 900)
    assert 1 - bound <= a.min() < 1 - 0.999 * bound
    assert 1 + 0.999 * bound < a.max() <= 1 + bound
    boxes = Own(
        lambda own: (own.a.data.normal_(), own.a.data[150:, 600:].fill_(7.0), own.b.data[1].fill_(5.0))
    )
    assert all(isinstance(start, ElementwiseInitializer) for start in read_initializers(boxes).values())
    weights = drawn(boxes)
    assert int((weights["a"] == 7.0).sum()) == 50 * 100 == int((weights["a"][150:, 600:] == 7.0).sum())
    assert [plane.unique().tolist() for plane in weights["b"]] == [[0.0], [5.0], [0.0]]
    assert weights["c"].tolist() == [2.0] * 9


WHOLE: dict[str, Callable[[Own], object]] = {
    "orthogonal": lambda own: nn.init.orthogonal_(own.a),
    "truncated": lambda own: nn.init.trunc_normal_(own.a, std=0.02),
    "copied": lambda own: own.a.data.copy_(torch.randn(200, 700)),
    "replaced": lambda own: setattr(own, "a", nn.Parameter(torch.randn(200, 700))),
    "replaced data": lambda own: setattr(own.a, "data", torch.randn(200, 700)),
    "by its values": lambda own: own.a.data.normal_().div_(own.a.norm().item()),
    "of another": lambda own: (own.a.data.normal_(), own.c.data.copy_(own.a.data[0, :9])),
    "turned": lambda own: own.a.data.T.normal_(),
    "turned part": lambda own: (own.a.data.normal_(), own.a.data.T[:20].fill_(3.0)),
    "part": lambda own: (own.a.data[:150].normal_(), own.a.data[150:].normal_()),
}


@pytest.mark.parametrize("how", WHOLE)
def test_any_other_reset_parameters_is_run_as_it_is(how: str) -> None:
    model = Own(WHOLE[how])
    if how != "truncated":  # by the inverse of its distribution until torch 2.11, which is elementwise
        assert all(isinstance(start, ModuleInitializer) for start in read_initializers(model).values())
    state = torch.get_rng_state()
    weights, again, other = drawn(model), drawn(Own(WHOLE[how])), drawn(Own(WHOLE[how]), seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(weights["a"], again["a"])
    assert not torch.equal(weights["a"], other["a"])
    assert 0 < weights["a"].std() < 2
    assert torch.equal(weights["b"], torch.zeros(3, 140, 530))
    if how == "orthogonal":
        torch.testing.assert_close(weights["a"] @ weights["a"].T, torch.eye(200), atol=1e-5, rtol=0)
    if how == "of another":
        assert torch.equal(weights["c"], weights["a"][0, :9])


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(3))


class Forgets(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 3)
        self.scale = nn.Parameter(torch.empty(3))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.arange(3.0)


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = {"short": [torch.arange(3.0)]}


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Tables, "1 (Tables): a tensor in its tables is neither a parameter nor a buffer"),
        (Plain, "1 (Plain): its tensor table is neither a parameter nor a buffer"),
        (Bare, "1 (Bare): it has parameters and no reset_parameters"),
        (
            lambda: nn.MultiheadAttention(8, 2),
            "no reset_parameters; Linear layers and scaled_dot_product_attention",
        ),
        (Forgets, "1 (Forgets): its reset_parameters leaves scale unset"),
        (lambda: nn.BatchNorm1d(3), "1 (BatchNorm1d): it has buffers and no reset_buffers"),
    ],
)
def test_a_module_that_does_not_say_how_it_starts_is_refused(
    layer: Callable[[], nn.Module], message: str
) -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3), layer())
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_initializers(model)
    with torch.device("meta"):
        assert read_initializers(nn.LSTM(3, 3)), "it has a list of its parameters"


@pytest.mark.parametrize("shape", [(), (7,), (100_000,), (300, 7), (5, 2000), (3, 200, 600), (64, 64, 3, 3)])
def test_tiles_cover_a_tensor_once(shape: tuple[int, ...]) -> None:
    sides = tile_shape(shape)
    assert math.prod(sides) <= TILE
    assert len(shape) < 2 or sides[-1] <= TILE_COLUMNS
    covered = torch.zeros(shape)
    for dim, side in enumerate(sides):
        for piece in tile_slices(torch.arange(shape[dim]), side):
            assert piece.tile_start % side == 0
            covered.narrow(dim, piece.in_shard.start, piece.in_shard.stop - piece.in_shard.start).add_(1)
    assert torch.equal(covered, torch.full(shape, float(len(shape))))


def test_interleaved_shards_are_cut_into_runs() -> None:
    found = tile_slices(torch.tensor([6, 7, 8, 9, 2, 3]), 8)
    assert [(p.tile_start, p.in_tile, p.in_shard) for p in found] == [
        (0, slice(6, 8), slice(0, 2)),
        (8, slice(0, 2), slice(2, 4)),
        (0, slice(2, 4), slice(4, 6)),
    ]


MESHES = {
    "tp": (4, "parallel=tp", (0, 1, 2, 3)),
    "fsdp": (4, "parallel=fsdp", (0, 1, 2, 3)),
    "hsdp": (4, "parallel=hsdp", (0, 1, 2, 3)),
    "fsdp_tp 4x2": (8, "parallel=fsdp_tp mesh.tp=2", (0, 3, 4, 7)),
    "fsdp_tp 2x4": (8, "parallel=fsdp_tp mesh.tp=4", (0, 2, 5, 7)),
    "hsdp_tp 2x2x2": (8, "parallel=hsdp_tp", (0, 3, 5, 6)),
}
"""Ranks, overrides, and which ranks are looked at every day: each place along each axis of several. The vocabulary of 263 is uneven on all of them; tp cuts wo and w2 along dim 1, within a tile."""
MODEL = "model=llama2_debug tokenizer.vocab_size=263 model.dim=576 model.ffn_dim=1200 model.n_heads=8 model.n_kv_heads=8 model.n_layers=1"


def part(full: Tensor, dim: int, parts: int, index: int) -> Tensor:
    chunks = full.chunk(parts, dim)
    return chunks[index] if index < len(chunks) else full.narrow(dim, 0, 0)


def differing(world: World, looked_at: dict[str, tuple[int, ...]]) -> dict[str, list[str]]:
    """By mesh, the parameters whose shard on a rank is not the part of the whole weight that the plan gives it.

    Args:
        looked_at: by mesh, the rank that each of these processes is.
    """
    found, whole = {}, drawn(meta_model(config(*MODEL.split()).model))
    for case, (size, overrides, _) in MESHES.items():
        if world.rank >= len(looked_at[case]):
            continue
        rank = looked_at[case][world.rank]
        cfg = config(*MODEL.split(), *overrides.split())
        sizes = validate(cfg, size)
        model, plan = plan_model(cfg, sizes)
        initializers = read_initializers(model)
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
        try:
            mesh = build_mesh(sizes, "cpu")
            parallelize(model, plan, cfg.parallel, mesh, cfg.train.dtype)
            materialize(model, CPU, from_seed(initializers, 0))
            _, shard, tp = mesh.get_coordinate() or [0, 0, 0]
            found[case] = []
            for name, parameter in model.named_parameters():
                expected, local = whole[name], parameter
                if isinstance(parameter, DTensor):
                    local, names = parameter.to_local(), parameter.device_mesh.mesh_dim_names or ()
                    placements = dict(zip(names, parameter.placements, strict=True))
                    if hasattr(placements.get("tp"), "dim"):
                        expected = part(expected, placements["tp"].dim, sizes.tp, tp)
                    if "dp_shard" in placements and sizes["dp_shard"] > 1:
                        expected = part(expected, 0, sizes["dp_shard"], shard)
                if not torch.equal(local, expected):
                    found[case].append(name)
                assert sum(len(index) for index in held_indices(parameter)) == sum(expected.shape)
        finally:
            dist.destroy_process_group()
    return found


@pytest.mark.parametrize("processes", [4, exhaustive(8)])
def test_every_rank_of_every_mesh_holds_its_part_of_the_same_weights(ranks: Ranks, processes: int) -> None:
    looked_at = {
        case: few if processes < size else tuple(range(size)) for case, (size, _, few) in MESHES.items()
    }
    by_rank = ranks.run(processes, differing, looked_at)
    for case, few in looked_at.items():
        assert [found[case] for found in by_rank[: len(few)]] == [[]] * len(few), case


def test_reading_allocates_nothing_of_70b() -> None:
    model = meta_model(config("model=llama2_70b", "tokenizer=bpe_32k", small=False).model)
    initializers = read_initializers(model)
    assert set(initializers) == {name for name, _ in model.named_parameters()}
    assert all(isinstance(start, ElementwiseInitializer) for start in initializers.values())
