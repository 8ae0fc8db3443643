"""Output layer and cross-entropy in chunks: the loss and gradients of the plain ones, to rounding, and far less memory."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.composed import config, corpus
from support.marks import exhaustive, on_card
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tpresearch.config import Config, ConfigError
from tpresearch.config.world import World
from tpresearch.data.batches import IGNORE_INDEX
from tpresearch.parallel.gradient_sums import GradientSums, summing_now
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.train import cross_entropy
from tpresearch.train.assemble import assemble
from tpresearch.train.cross_entropy import backward_from, linear_cross_entropy
from tpresearch.train.losses import ChunkedCrossEntropy, FullCrossEntropy, summed_cross_entropy
from tpresearch.train.preflight import preflight
from tpresearch.verify.ranks import Ranks

TOKENS, WIDTH, VOCABULARY = 96, 64, 1003
TOLERANCES = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}


def drawn(dtype: torch.dtype, vocabulary: int = VOCABULARY) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [4, 24, h], a weight [V, h], and targets: the first and the last token among them, and some that are none."""
    torch.manual_seed(0)
    hidden = torch.randn(4, TOKENS // 4, WIDTH, dtype=dtype)
    weight = torch.randn(vocabulary, WIDTH, dtype=dtype).mul_(0.1)
    targets = torch.randint(vocabulary, (4, TOKENS // 4))
    targets[0, 3:9] = IGNORE_INDEX
    targets[1, :2] = torch.tensor([0, vocabulary - 1])
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def gradient_of(tensor: Tensor) -> Tensor:
    assert tensor.grad is not None
    return tensor.grad


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """What would be compiled runs as it is written."""
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize("compile", [False, True], ids=["in place", "to be fused"])
@pytest.mark.parametrize("chunk", [1, 7, 32, TOKENS, 10 * TOKENS])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_it_is_the_plain_one(dtype: torch.dtype, chunk: int, compile: bool, uncompiled: None) -> None:
    check_plain(dtype, chunk, compile)


@pytest.mark.parametrize("dtype", [on_card(dtype) for dtype in TOLERANCES])
def test_on_a_card_it_is_the_plain_one(dtype: torch.dtype) -> None:
    check_plain(dtype, 32, compile=False, device="cuda")


@pytest.mark.parametrize("dtype", [on_card(torch.float64), on_card(torch.bfloat16)])
@pytest.mark.parametrize("vocabulary", [VOCABULARY, 5 * VOCABULARY])
def test_on_a_card_it_is_the_plain_one_in_fused_kernels(
    own_graphs: None, dtype: torch.dtype, vocabulary: int
) -> None:
    """Whether one holds a row of logits, or finds maximum and sum in one pass over it."""
    check_plain(dtype, 32, compile=True, device="cuda", vocabulary=vocabulary)


def test_logits_that_were_copied_are_let_go_though_the_caller_holds_its_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a frame that dynamo evaluates does."""
    logits = torch.randn(4, 8, dtype=torch.bfloat16)
    seen, alive, multiply = weakref.ref(logits), [], torch.mul
    arguments = [logits], torch.tensor([1, 2, 3, 4]), 1.0, None, True
    del logits
    monkeypatch.setattr(torch, "mul", lambda *a, **k: (alive.append(seen()), multiply(*a, **k))[1])
    cross_entropy._loss_and_gradient(*arguments)
    assert alive == [None]


def test_fused_it_is_the_plain_one() -> None:
    check_plain(torch.bfloat16, TOKENS // 2, compile=True)


def test_chunks_of_any_number_of_sizes_are_fused(own_graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a compiler's backend that only counts: torch compiles for 8 shapes at most."""
    counter = CompileCounterWithBackend("eager")
    compile_, fused = torch.compile, functools.cache(cross_entropy._fused.__wrapped__)
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile_(f, backend=counter, **options))
    monkeypatch.setattr(cross_entropy, "_fused", fused)
    for chunk in range(8, 40):
        check_plain(torch.float64, chunk, compile=True)
    assert counter.frame_count == 2 * 2  # functions, each for the first shape and then for any


def check_plain(
    dtype: torch.dtype, chunk: int, compile: bool, device: str = "cpu", vocabulary: int = VOCABULARY
) -> None:
    given = drawn(dtype, vocabulary)
    hidden, weight, targets = (t.detach().to(device).requires_grad_(t.requires_grad) for t in given)
    plain = summed_cross_entropy(F.linear(hidden, weight), targets) / 7
    ours = linear_cross_entropy(hidden, weight, targets, chunk, 1 / 7, compile)
    assert ours.dtype == plain.dtype
    assert relative(ours, plain) < TOLERANCES[dtype]
    wanted = torch.autograd.grad(3 * plain, (hidden, weight))
    for name, gradient, right in zip(
        ("hidden", "weight"), torch.autograd.grad(3 * ours, (hidden, weight)), wanted, strict=True
    ):
        assert gradient.dtype == dtype
        assert relative(gradient, right) < TOLERANCES[dtype] * (3 if chunk == 1 else 1), name


def test_a_logit_far_above_the_others_does_not_overflow() -> None:
    hidden, weight, targets = drawn(torch.float32)
    with torch.no_grad():
        weight[5] = 100 * hidden[1, 2]
    plain = summed_cross_entropy(F.linear(hidden, weight), targets)
    assert relative(linear_cross_entropy(hidden, weight, targets, 32), plain) < 1e-6
    assert plain.isfinite()


def test_frozen_parts_get_no_gradient_and_none_is_made_without_autograd() -> None:
    hidden, weight, targets = drawn(torch.float32)
    plain = summed_cross_entropy(F.linear(hidden, weight), targets)
    of_hidden, of_weight = torch.autograd.grad(plain, (hidden, weight))
    linear_cross_entropy(hidden, weight.detach(), targets, 32).backward()
    assert relative(gradient_of(hidden), of_hidden) < 1e-6
    hidden.grad = None
    linear_cross_entropy(hidden.detach(), weight, targets, 32).backward()
    assert hidden.grad is None
    assert relative(gradient_of(weight), of_weight) < 1e-6
    with torch.no_grad(), FlopCounterMode(display=False) as matmuls:
        assert not linear_cross_entropy(hidden, weight, targets, 32).requires_grad
    assert matmuls.get_total_flops() == 2 * TOKENS * WIDTH * VOCABULARY  # those of the logits alone


@pytest.mark.parametrize(
    ("typed", "has_effect"),
    [
        ("parallel=tp mesh.tp=2", True),
        ("parallel=tp mesh.tp=2 parallel.loss_parallel=false", False),
        ("model=toy_net parallel=none data=uniform train.loss=sum", False),
    ],
)
def test_a_chunk_is_noted_where_there_are_none(typed: str, has_effect: bool) -> None:
    cfg = config("model=toy_mlp", "train.loss_chunk=8", "plan_only=true", *typed.split())
    note = "train.loss_chunk=8 has no effect: the loss takes a micro-batch's whole output"
    assert (note in preflight(cfg, World()).notes) != has_effect
    as_it_is = replace(cfg, train=replace(cfg.train, loss_chunk=2048))
    assert not any("loss_chunk" in each for each in preflight(as_it_is, World()).notes)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_weights_gradient_is_added_to_a_sum(dtype: torch.dtype) -> None:
    """In bfloat16 it is closer to the true one than one that is rounded per chunk."""
    hidden, weight, targets = drawn(dtype)
    plain = weight.detach().double().requires_grad_()
    summed_cross_entropy(hidden.detach().double() @ plain.T, targets).backward()
    layer, wide, sums = head(weight)
    with sums.collecting():
        for times in (1, 2):
            hidden.grad = None
            backward_from(linear_cross_entropy(hidden, layer.weight, targets, 32, summing=summing_now(layer)))
            assert relative(gradient_of(wide).double(), times * gradient_of(plain)) < TOLERANCES[dtype] / 2
    assert layer.weight.grad is None
    expected, *_ = drawn(dtype)
    linear_cross_entropy(expected, weight, targets, 32).backward()
    assert torch.equal(gradient_of(hidden), gradient_of(expected))


def head(weight: Tensor) -> tuple[nn.Linear, nn.Parameter, GradientSums]:
    """An output layer of that weight, and a parameter whose gradient is the sum of its gradients, in at least float32."""
    layer = nn.Linear(WIDTH, VOCABULARY, bias=False)
    layer.weight = nn.Parameter(weight.detach())
    wide = nn.Parameter(weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True))
    return layer, wide, GradientSums({layer: wide})


def test_a_loss_that_was_added_to_a_sum_is_what_has_to_be_differentiated() -> None:
    hidden, weight, targets = drawn(torch.float32)
    layer, wide, sums = head(weight)

    def loss() -> Tensor:
        return linear_cross_entropy(hidden, layer.weight, targets, 32, summing=summing_now(layer))

    def step(divisor: int | None = None, discarded: int = 0) -> None:
        with sums.collecting():
            for _ in range(discarded):
                loss()
            with torch.no_grad():
                loss()
            backward_from(loss() / divisor if divisor else loss())

    with pytest.raises(ConfigError, match="false, or `backward_from` the loss itself"):
        step(divisor=2)
    with pytest.raises(ConfigError, match="which backward did not reach once"):
        step(discarded=1)
    step()
    loss().backward()
    assert relative(gradient_of(wide), gradient_of(layer.weight)) < 1e-6


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_gradients_of_the_loss_itself_are_not_multiplied(factor: float) -> None:
    hidden, weight, targets = drawn(torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets, 32)
    with Multiplied() as mode:
        backward_from(loss if factor == 1 else loss * factor)
    assert mode.sizes.count(weight.numel()) == (factor != 1)
    once = gradient_of(weight).clone()
    weight.grad = None
    (linear_cross_entropy(hidden, weight, targets, 32) * factor).backward()
    assert torch.equal(gradient_of(weight), once)


class Multiplied(TorchDispatchMode):
    """Sizes of what is multiplied in place."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is torch.ops.aten.mul_:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_a_second_backward_is_refused() -> None:
    hidden, weight, targets = drawn(torch.float32)
    loss = linear_cross_entropy(hidden, weight, targets, 32)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Peak(TorchDispatchMode):
    """The most bytes of tensors made inside that were alive together, beside those given."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.live = {tensor.untyped_storage()._cdata: 0 for tensor in given}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
                self.peak = max(self.peak, sum(self.live.values()))
        return result


def peak_bytes(chunk: int | None) -> int:
    """Of the loss of 8,192 tokens of Llama-3-8B in bfloat16, forward and backward; inputs are not counted."""
    with FakeTensorMode():
        hidden = torch.empty(2, 4096, 4096, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(128_256, 4096, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(2, 4096, dtype=torch.int64)
        with Peak(hidden, weight, targets) as seen:
            if chunk is None:
                summed_cross_entropy(F.linear(hidden, weight), targets).backward()
            else:
                linear_cross_entropy(hidden, weight, targets, chunk).backward()
    return seen.peak


def test_a_vocabulary_of_128k_takes_a_fraction_of_the_memory() -> None:
    """12.6 GB of logits in float32, their gradient and the weight's, against 2.7 for 2,048 tokens at a time."""
    plain, chunked = peak_bytes(None), peak_bytes(2048)
    print(f"peak bytes of the loss: {plain / 1e9:.2f} GB, in chunks {chunked / 1e9:.2f} GB")
    of_weight, of_hidden, logits = 128_256 * 4096 * 2, 8192 * 4096 * 2, 2048 * 128_256
    assert plain > 12e9
    assert chunked < of_weight + of_hidden + logits * (4 + 2 + 2) + 2**24


def steps(world: World, cfgs: list[Config]) -> list[tuple[list[tuple[float, float]], float | None, type]]:
    """Of each config: (share of the loss, gradient norm) of two steps, the held-out loss, and the kind of loss.

    The last one's is computed as it would be compiled, where it is in chunks.
    """
    found, jobs = [], [preflight(cfg, world) for cfg in cfgs]
    device = jobs[0].device
    assert device
    with process_group(device, world):
        for job in jobs:
            loop = assemble(job, build_mesh(job.sizes, "cpu"), device, corpus())
            objective = loop.setup.objective
            if isinstance(objective, ChunkedCrossEntropy) and job is jobs[-1]:
                loop.setup = replace(loop.setup, objective=replace(objective, compile=True))
                torch.compiler.set_stance("force_eager")
            pairs = [(loss.item(), norm.item()) for loss, norm in (loop.step() for _ in range(2))]
            found.append((pairs, loop.evaluate(), type(loop.setup.objective)))
    return found


@pytest.mark.parametrize(
    ("plan", "size", "model"),
    [
        ("none", 1, "toy_mlp"),
        exhaustive("tp", 2, "toy_mlp"),
        ("sp", 2, "llama2_debug"),
        ("fsdp_tp", 4, "toy_mlp"),
        exhaustive("none", 1, "llama2_debug"),
        exhaustive("tp", 2, "llama2_debug"),
        exhaustive("fsdp_tp", 4, "llama2_debug"),
    ],
)
def test_training_and_evaluation_are_the_plain_ones(ranks: Ranks, plan: str, size: int, model: str) -> None:
    """Of a vocabulary that the ranks hold uneven parts of."""
    settings = (f"model={model}", f"parallel={plan}", "train.dtype=float64", "model.vocab_size=263")
    cfgs = [config(*settings, f"train.loss_chunk={chunk}") for chunk in ("null", 5, 5)]
    (plain, held_out, first), (ours, ours_held_out, second), fused = ranks.run(size, steps, cfgs)[0]
    assert (first, second) == (FullCrossEntropy, ChunkedCrossEntropy)
    assert ours == [pytest.approx(pair, rel=1e-12) for pair in plain]
    assert fused[0] == [pytest.approx(pair, rel=1e-12) for pair in plain]
    assert ours_held_out == pytest.approx(held_out, rel=1e-12)


def test_where_logits_are_gathered_the_loss_is_the_plain_one(ranks: Ranks) -> None:
    cfg = config("model=llama2_debug", "parallel=tp", "parallel.loss_parallel=false")
    assert ranks.run(2, steps, [cfg])[0][0][2] is FullCrossEntropy
