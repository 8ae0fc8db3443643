"""Dropout draws by its place in the run: the same run to the bit, replicas alike, shards apart, recomputed alike."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from support.assembled import assembled, planned, ranks_of_a_host, refusal
from support.composed import config
from support.counted_steps import FAKE
from support.marks import exhaustive, on_card
from support.nets import Dropped, RandomlyLeaky, Thinned, ThinnedByHand, model
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import _random as dtensor_random

from tpresearch.config import Config
from tpresearch.config.axes import MeshSizes
from tpresearch.config.world import World
from tpresearch.models.toy_mlp import ToyLM
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.plan.describe import plan_text
from tpresearch.plan.meta import meta_model
from tpresearch.train import cross_entropy, randomness
from tpresearch.train.randomness import SeededRandomness, _dropout_on_shards, kept_elements
from tpresearch.train.state import TrainState
from tpresearch.train.step import accumulate_gradients
from tpresearch.verify.ranks import Ranks


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def dropped(world: World, cfg: Config) -> tuple[list[float], list[Tensor]]:
    """Loss and norm of two steps, and which features were dropped in each forward pass."""
    masks: list[Tensor] = []
    with assembled(cfg, world) as loop:
        if hasattr(loop.state.model, "drop"):
            drop = loop.state.model.get_submodule("drop")
            drop.register_forward_hook(lambda _, args, out: masks.append((out.detach() == 0).cpu()))
        numbers = [number.item() for _ in range(2) for number in loop.step()]
    return numbers, masks


def test_the_same_seed_is_the_same_run_to_the_bit_and_another_is_another() -> None:
    cfg = config(*model(Dropped), "parallel=none", "train.micro_batch_size=4")
    (first, masks), (again, _) = dropped(World(), cfg), dropped(World(), cfg)
    assert first == again
    assert len(masks) == 4
    assert not any(torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])
    assert all(0.45 < mask.float().mean() < 0.55 for mask in masks)
    assert dropped(World(), config(*model(Dropped), "parallel=none", "train.seed=1"))[0] != first


class ScaledByChance(ToyLM):
    """As a layer that is left out by chance is often written."""

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        x = self.embed(tokens)
        return self.output(x + self.mlp(x) * (random.random() + np.random.random()))


def test_what_python_and_numpy_draw_is_seeded_too_and_alike_on_tensor_parallel_ranks(ranks: Ranks) -> None:
    settings = (*model(ScaledByChance), "train.dtype=float64")
    alone = config(*settings, "parallel=none")
    first, again = dropped(World(), alone), dropped(World(), alone)
    assert first == again
    for numbers, _ in ranks.run(2, dropped, config(*settings, "parallel=tp")):
        assert numbers == pytest.approx(first[0], rel=1e-9)
    error = refusal(*settings, "parallel=none", "parallel.activation_checkpointing=full")
    assert error.why.startswith("the model draws by Python's or NumPy's generator, and what is recomputed")


@pytest.mark.parametrize(("plan", "alike"), [("tp", True), ("sp", False), ("fsdp", False)])
def test_replicas_agree_and_shards_draw_their_own(ranks: Ranks, plan: str, alike: bool) -> None:
    (_, mine), (_, theirs) = ranks.run(2, dropped, config(*model(Dropped), f"parallel={plan}"))
    assert [torch.equal(a, b) for a, b in zip(mine, theirs, strict=True)] == [alike] * len(mine)


def test_what_is_recomputed_drops_the_same(ranks: Ranks) -> None:
    """Under sp each rank draws by its own place; recomputing in backward must come to the same."""
    settings = (*model(Dropped), "parallel=sp", "model.blocks=[drop,mlp]", "train.dtype=float64")
    plain = ranks.run(2, dropped, config(*settings))
    again = ranks.run(2, dropped, config(*settings, "parallel.activation_checkpointing=full"))
    assert [numbers for numbers, _ in plain] == [pytest.approx(numbers, rel=1e-12) for numbers, _ in again]


def thinned(world: World, cfg: Config) -> tuple[list[float], list[str]]:
    """Loss and norm of two compiled steps, and what its dropout on shards was seeded by."""
    seeds = []

    def noted(text: str, seed: Callable[[str], int] = randomness.seed_of) -> int:
        if "mlp.relu" in text:
            seeds.append(text)
        return seed(text)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        patch.setattr(cross_entropy, "_fused", lambda function: function)
        patch.setattr(randomness, "seed_of", noted)
        return dropped(world, cfg)[0], seeds


@pytest.mark.parametrize("plan", [exhaustive("tp"), "sp"])
def test_compiled_shards_draw_their_own_and_recompute_the_same(ranks: Ranks, plan: str) -> None:
    rules = f"model.plans.{plan}.out_proj.match=mlp.out_proj.0"
    settings = (*model(Thinned), f"parallel={plan}", rules, "train.dtype=float64", "parallel.compile=true")
    plain = ranks.run(2, thinned, config(*settings, "train.micro_batch_size=4"))
    (numbers, mine), (same, theirs) = plain
    assert numbers == same
    assert len({*mine, *theirs}) == len(mine) + len(theirs) == 2 * 4  # micro-batches
    full = (*settings, "train.micro_batch_size=4", "parallel.activation_checkpointing=full")
    again = ranks.run(2, thinned, config(*full))
    assert [found for found, _ in again] == [pytest.approx(numbers, rel=1e-12)] * 2
    assert again[0][1] == [seed for seed in mine for _ in range(2)]


@pytest.mark.parametrize("plan", [on_card("tp"), on_card("sp")])
def test_compiled_shards_on_a_card_recompute_the_same(ranks: Ranks, plan: str) -> None:
    rules = f"model.plans.{plan}.out_proj.match=mlp.out_proj.0"
    settings = (*model(Thinned), f"parallel={plan}", rules, "train.dtype=float64", "parallel.compile=true")
    plain = ranks.run(2, dropped, config(*settings, "device=cuda"))
    full = ranks.run(2, dropped, config(*settings, "device=cuda", "parallel.activation_checkpointing=full"))
    assert plain[0][0] == plain[1][0]
    assert [numbers for numbers, _ in full] == [pytest.approx(numbers, rel=1e-12) for numbers, _ in plain]


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["none", "selective", "full"])
@pytest.mark.parametrize("device", ["cpu", on_card("cuda")])
def test_compiled_blocks_recompute_what_they_drew(own_graphs: None, device: str, kind: str) -> None:
    """The gradient's norm is the loss's slope along the gradient, where forward and backward have the same elements."""
    settings = (*model(Thinned), "parallel=none", "train.dtype=float64", "parallel.compile=true")
    cfg = config(*settings, f"parallel.activation_checkpointing={kind}", f"device={device}")
    with assembled(cfg) as loop:
        state, setup = loop.state, loop.setup
        weights, rows = [*state.model.parameters()], loop.read().split(setup.micro_rows)

        def loss() -> float:
            with setup.observers.step(state):
                return accumulate_gradients(state, rows, setup).item()

        loss()
        gradients = [gradient_of(weight).clone() for weight in weights]
        norm = torch.nn.utils.get_total_norm(gradients).item()
        found = []
        for move in (1e-5, -2e-5):
            torch._foreach_add_([weight.data for weight in weights], gradients, alpha=move / norm)
            found.append(loss())
    assert (found[0] - found[1]) / 2e-5 == pytest.approx(norm, rel=1e-6)


def test_a_backward_that_would_draw_anew_is_refused() -> None:
    settings = (*model(Thinned), "parallel=none", "parallel.compile=true")
    error = refusal(*settings, "parallel.activation_checkpointing=budget")
    assert str(error).startswith("parallel.activation_checkpointing=budget: mlp.relu draws")


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_noise_that_recomputing_would_not_draw_is_refused(kind: str) -> None:
    leaky = (*model(RandomlyLeaky), "parallel=none")
    error = refusal(*leaky, f"parallel.activation_checkpointing={kind}")
    assert str(error).startswith(f"parallel.activation_checkpointing={kind}: mlp.relu calls rrelu")
    assert dropped(World(), config(*leaky))[0]


def test_the_elements_kept_follow_from_the_seed_and_the_place() -> None:
    x, seed = torch.randn(64, 1000), torch.tensor(7)
    kept = kept_elements(x, 0.75, seed, "drop (0,)")
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.01)
    assert torch.equal(kept, kept_elements(x, 0.75, seed, "drop (0,)"))
    for other in ((torch.tensor(8), "drop (0,)"), (seed, "drop (1,)")):
        assert 0.3 < (kept != kept_elements(x, 0.75, *other)).float().mean() < 0.45


def test_compiled_dropout_scales_what_it_keeps_and_its_gradient() -> None:
    drop, seed = nn.Dropout(0.5), torch.tensor(1)
    forward = torch.compile(_dropout_on_shards(drop, 64, seed, ""), backend="aot_eager")
    x = torch.ones(4, 8, requires_grad=True)
    out = forward(x)
    out.sum().backward()
    assert set(out.flatten().tolist()) == {0.0, 2.0}
    assert torch.equal(gradient_of(x), out)
    drop.p = 1.0
    assert not forward(x).any()
    assert torch.equal(
        forward(torch.ones(8, 8)) != 0, torch.zeros(8, 8, dtype=torch.bool)
    )  # torch's own, whole
    drop.eval()
    assert torch.equal(forward(x), x)


def test_a_dtensor_stays_one() -> None:
    drop, seed = nn.Dropout(0.5), torch.tensor(1)
    with process_group(FAKE, ranks_of_a_host(2)):
        mesh = build_mesh(MeshSizes(tp=2), "cpu")["tp"]
        x = DTensor.from_local(torch.ones(4, 8, requires_grad=True), mesh, [Shard(0)])
        out = _dropout_on_shards(drop, x.numel(), seed, "")(x)
        assert isinstance(out, DTensor)
        assert (out.shape, out.placements) == (x.shape, x.placements)
        assert set(out.to_local().flatten().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(("plan", "asked"), [("tp", 1), ("fsdp", 0)])
def test_on_cuda_the_first_draw_on_a_dtensor_takes_no_state_of_another_rank(
    monkeypatch: pytest.MonkeyPatch, plan: str, asked: int
) -> None:
    """Torch's tracker of these draws sends rank 0's state when it is made, unless it is told not to."""
    synchronizes: list[bool] = []
    net, compiled = planned(*model(Dropped), f"parallel={plan}", world=2)
    with process_group(FAKE, ranks_of_a_host(2)):
        mesh = build_mesh(compiled.sizes, "cpu")
        monkeypatch.setattr(DeviceMesh, "device_type", "cuda")
        monkeypatch.setattr(dtensor_random, "_rng_tracker", None)
        made = lambda _, run_state_sync: synchronizes.append(run_state_sync)  # noqa: E731
        monkeypatch.setattr(dtensor_random, "OffsetBasedRNGTracker", made)
        state = TrainState(0, net, torch.optim.SGD(net.parameters()))
        SeededRandomness(0, mesh, compiled, compiled=False).start(state)
    assert synchronizes == [False] * asked


def test_what_compiled_ranks_cannot_draw_apart_is_refused() -> None:
    settings = (*model(ThinnedByHand), "parallel.compile=true")
    error = refusal(*settings, "parallel=tp")
    assert str(error).startswith("parallel.compile=true: mlp.relu draws random numbers; compiled")
    planned(*settings, "parallel=fsdp")


def test_the_plan_says_that_equality_is_not_claimed() -> None:
    text = plan_text(*planned(*model(Dropped), "parallel=none"))
    assert "random numbers: drop draw by (seed, step, micro-batch, data-parallel rank)" in text
    assert "not claimed" in text
    assert "random" not in plan_text(*planned("model=llama2_debug", "parallel=none"))


class Wired(ToyLM):
    """Whose constructor draws which features it keeps."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        drawn = torch.rand(8, device="cpu").tolist()
        self.kept = random.sample(range(dim), 8), np.random.permutation(dim).tolist(), drawn


def test_a_constructor_draws_the_same_in_each_process() -> None:
    """Ranks would be different models otherwise, as would a run that resumes; draws of a caller go on as if there had been none."""
    kept = []
    for process in (1, 2):
        random.seed(process)
        np.random.seed(process)
        torch.manual_seed(process)
        net = meta_model(config(*model(Wired)).model)
        assert isinstance(net, Wired)
        kept.append(net.kept)
        assert random.random() == random.Random(process).random()
        assert np.random.random() == np.random.RandomState(process).random()
        assert torch.initial_seed() == process
    assert kept[0] == kept[1]
