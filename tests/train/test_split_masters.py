"""Float32 master weights in the model's bfloat16 copies and 16 more bits (`optimizer.split_masters=true`): the same numbers."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path

import pytest
import torch
from support.assembled import assembled, joined
from support.checkpointed import Went, equal, go, on_disk, whole
from support.composed import config, corpus
from support.marks import exhaustive, on_card
from support.nets import Frozen, Tied, model
from torch import Tensor, nn

from tpresearch.checkpoint.disk import folder_of
from tpresearch.config.world import World
from tpresearch.launch import Run
from tpresearch.parallel.weights import from_seed, local_part
from tpresearch.train import state
from tpresearch.train.adamw import ElementwiseAdamW
from tpresearch.train.assemble import assemble
from tpresearch.train.halves import join, split
from tpresearch.train.loop import Loop
from tpresearch.train.saving import build_saver
from tpresearch.train.state import MasterWeights
from tpresearch.verify.ranks import Ranks

pytestmark = pytest.mark.usefixtures("own_graphs")

BFLOAT16 = "model=llama2_debug", "train.dtype=bfloat16"
SPLIT = "optimizer.split_masters=true"
TIE = 0x8000
"""The lower half of a number in the middle between two bfloat16 numbers."""


def bits_of(x: Tensor) -> Tensor:
    return x.view(torch.int32)


def drawn_bits(count: int = 100_000) -> Tensor:
    drawn = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(0))
    return drawn.to(torch.int32).view(torch.float32)


def test_halves_are_the_number_to_the_bit() -> None:
    limits = torch.finfo(torch.float32)
    special = [0.0, limits.max, limits.tiny, limits.smallest_normal, torch.inf, 1.0, 1 + limits.eps]
    special += [1e-45, 2 * limits.tiny, 1 + 2**-8, 1 + 3 * 2**-8, float.fromhex("0x1.fefffep127")]
    given = torch.tensor([*special, *(-x for x in special)])
    numbers = torch.cat([given, drawn_bits()])
    numbers = numbers[~numbers.isnan()]
    upper, lower = split(numbers)
    assert upper.dtype is lower.dtype is torch.int16
    assert torch.equal(bits_of(join(upper, lower)), bits_of(numbers))
    copy, rounded = upper.view(torch.bfloat16), numbers.bfloat16()
    tied = (bits_of(numbers) & 0xFFFF) == TIE
    assert torch.equal(copy[~tied], rounded[~tied])
    assert (copy[tied].double().abs() >= numbers[tied].double().abs()).all()


@pytest.mark.parametrize("bits", [0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1])
def test_no_nan_becomes_a_number(bits: int) -> None:
    """The first is CUDA's, which would be rounded up to minus zero."""
    upper, lower = split(torch.tensor([bits], dtype=torch.int32).view(torch.float32))
    assert upper.view(torch.bfloat16).isnan()
    assert join(upper, lower).isnan()


@pytest.mark.parametrize(
    ("device", "compile", "moments"),
    [
        ("cpu", False, None),
        ("cpu", False, torch.bfloat16),
        exhaustive("cpu", True, None),
        ("cpu", True, torch.bfloat16),
        on_card("cuda", False, None),
        on_card("cuda", True, torch.bfloat16),
    ],
)
def test_updates_of_halves_are_those_of_whole_weights(
    device: str, compile: bool, moments: torch.dtype | None
) -> None:
    """With weight decay, a divisor of gradients, and an update that is skipped. (A GPU may fuse other products and sums.)"""
    whole_ones, halved = ([nn.Parameter(x.to(device)) for x in drawn_weights()] for _ in range(2))
    copies = {weight: weight.detach().bfloat16() for weight in (*whole_ones, *halved)}
    remainders = {}
    for weight in halved:
        upper, remainders[weight] = split(weight.detach())
        copies[weight] = upper.view(torch.bfloat16)
        weight.untyped_storage().resize_(0)
    make = functools.partial(ElementwiseAdamW, lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizers = [
        make([{"params": each}], moments, compile, copies, remainders) for each in (whole_ones, halved)
    ]
    most = 0.0 if device == "cpu" else 1e-6
    for step in range(4):
        for one, other in zip(whole_ones, halved, strict=True):
            one.grad = torch.randn(one.shape).to(device)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.grad_scale = torch.tensor(3.3, device=device)
            optimizer.found_inf = torch.tensor(float(step == 2), device=device)
            optimizer.step()
        for one, other in zip(whole_ones, halved, strict=True):
            assert not other.untyped_storage().nbytes()
            found = join(copies[other].view(torch.int16), remainders[other])
            assert (found - one.detach()).abs().max() <= most
            tied = (bits_of(found) & 0xFFFF) == TIE
            assert torch.equal(copies[other][~tied], found.bfloat16()[~tied])
    for key, value in optimizers[0].state[whole_ones[0]].items():
        assert torch.equal(value, optimizers[1].state[halved[0]][key]) or device == "cuda"


def drawn_weights() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in ((8, 1024), (7, 13), (5,))]


def test_compiled_halves_are_joined_and_split_in_the_updates_one_kernel() -> None:
    weight = nn.Parameter(torch.randn(8, 1024))
    upper, lower = split(weight.detach())
    optimizer = ElementwiseAdamW(
        [{"params": [weight]}], None, True, {weight: upper.view(torch.bfloat16)}, {weight: lower}
    )
    weight.grad = torch.randn(8, 1024)
    torch._dynamo.utils.counters.clear()
    torch._inductor.metrics.reset()
    optimizer.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert torch._inductor.metrics.generated_kernel_count == 1


def trained(world: World, words: tuple[str, ...], steps: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    """Losses, and the whole state; every master is one NaN between steps where it is split, and in the update."""
    with assembled(config(*words), world) as loop:
        loop.state.optimizer.register_step_post_hook(lambda *_: check_released(loop, SPLIT in words))
        losses = []
        for _ in range(steps):
            losses.append(loop.step().loss.item())
            check_released(loop, SPLIT in words)
        loop.evaluate()
        found = whole(loop.state)
        check_released(loop, SPLIT in words)
        return losses, found


def check_released(loop: Loop, is_split: bool) -> None:
    for parameter in loop.state.trained_parameters().values():
        part = local_part(parameter)
        assert part.untyped_storage().nbytes() == (4 if is_split else part.nbytes)
        assert part.isnan().all() == is_split


@pytest.mark.parametrize(
    ("words", "size"),
    [
        (("parallel=none", "train.micro_batch_size=2"), 1),
        (
            (
                "parallel=none",
                "optimizer.moment_dtype=bfloat16",
                "parallel.gradient_accumulation_fusion=true",
                "train.micro_batch_size=2",
            ),
            1,
        ),
        (("parallel=tp",), 2),
        (("parallel=ddp",), 2),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else "",
)
def test_a_run_is_that_of_whole_masters(ranks: Ranks, words: tuple[str, ...], size: int) -> None:
    """Its losses are equal but for the few copies that are ties, which are rounded otherwise."""
    words = (*BFLOAT16, *words)
    (losses, state), (other_losses, other_state) = (
        ranks.run(size, trained, each)[0] if size > 1 else trained(World(), each)
        for each in (words, (*words, SPLIT))
    )
    assert other_losses == pytest.approx(losses, rel=1e-3)
    assert state.keys() == other_state.keys()
    for name, tensor in state.items():
        assert other_state[name].dtype is tensor.dtype
        assert torch.allclose(other_state[name], tensor, rtol=0.05, atol=0.1 * float(tensor.abs().max())), (
            name
        )


def alone(words: tuple[str, ...], steps: int, start: Path | None = None, run: Path | None = None) -> Went:
    went = go(World(), config(*BFLOAT16, "parallel=none", *words), steps, start, run, (2,))
    assert went
    return went


@pytest.mark.parametrize("words", [(), (SPLIT,)], ids=["whole", "split"])
def test_a_checkpoint_is_of_float32_weights_whichever_run_wrote_it(
    tmp_path: Path, words: tuple[str, ...]
) -> None:
    wrote = alone(words, 2, run=tmp_path)
    assert {value.dtype for value in wrote.state.values()} == {torch.float32}
    resumed = [alone(each, 1, folder_of(tmp_path, 2)) for each in ((), (SPLIT,))]
    for went in resumed:
        assert equal(went.restored, wrote.state)
    never_stopped = alone(words, 3)
    assert equal(resumed[bool(words)].state, never_stopped.state)
    assert resumed[bool(words)].losses == never_stopped.losses[2:]


def test_a_checkpoint_in_the_background_is_of_the_step_that_it_was_begun_at(tmp_path: Path) -> None:
    cfg = config(*BFLOAT16, "parallel=none", SPLIT, "checkpoint.background=true")
    with joined(cfg) as (job, mesh, device):
        loop = assemble(job, mesh, device, corpus())
        saver = build_saver(job, Run(tmp_path, World()), corpus(), 0, None)
        loop.step()
        saver.save(loop.state, 0, 1.0)
        assert saver.started == 1
        then = whole(loop.state)
        loop.step()
        saver.finish()
        assert not equal(whole(loop.state), then)
    assert equal(on_disk(folder_of(tmp_path, 1)), then)


@pytest.mark.parametrize("kind", [Frozen, Tied])
def test_weights_that_are_frozen_or_tied(kind: type[nn.Module]) -> None:
    words = (*model(kind), "parallel=none", "train.dtype=bfloat16", "train.loss_chunk=null")
    (_, state), (_, other) = (trained(World(), (*words, *each), steps=1) for each in ((), (SPLIT,)))
    assert state.keys() == other.keys()
    frozen = [
        name
        for name in state
        if name.startswith("model.") and name.replace("model", "optimizer") + ".step" not in state
    ]
    assert bool(frozen) == (kind is Frozen)
    assert all(torch.equal(state[name], other[name]) for name in frozen)


def test_weights_are_set_from_outside() -> None:
    with assembled(config(*BFLOAT16, "parallel=none", SPLIT)) as loop:
        before = whole(loop.state)
        loop.state.set_weights(from_seed(loop.setup.plan.initializers, 1))
        check_released(loop, is_split=True)
        other = whole(loop.state)
        with pytest.raises(KeyboardInterrupt):
            loop.state.set_weights(interrupted)
        loop.state.set_weights(from_seed(loop.setup.plan.initializers, 0))
        assert equal(whole(loop.state), before)
        assert not equal(other, before)
        assert {parameter.dtype for parameter in loop.state.model.parameters()} == {torch.bfloat16}


def interrupted(_: nn.Module) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("line", "at"), [("join", 1), ("split", 1), ("local_part", 5), ("_nan_like", 1)])
def test_ctrl_c_where_whole_is_entered_or_left_leaves_none_whole(
    line: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the second of four masters."""
    layers = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    masters = MasterWeights(layers, splits=True)
    before = [copy.detach().float() for copy in layers.parameters()]
    function, calls = getattr(state, line), itertools.count()

    def interrupted(*given: object) -> object:
        if next(calls) == at:
            raise KeyboardInterrupt
        return function(*given)

    monkeypatch.setattr(state, line, interrupted)
    with pytest.raises(KeyboardInterrupt):
        set_to_a_third(masters)
    assert all(master.isnan().all() for master in masters.copies)
    with masters.whole():
        for master, copied, old in zip(masters.copies, layers.parameters(), before, strict=True):
            right = old if line == "join" else torch.full_like(master, 1 / 3)
            assert torch.equal(copied, right.bfloat16())
            assert line == "join" or torch.equal(master, right)


def set_to_a_third(masters: MasterWeights) -> None:
    with masters.whole():
        for master in masters.copies:
            master.detach().fill_(1 / 3)


def test_steps_while_weights_are_read_are_those_of_whole_masters() -> None:
    found = []
    for each in ((), (SPLIT,)):
        words = (*BFLOAT16, "parallel=none", "optimizer.moment_dtype=bfloat16", *each)
        with assembled(config(*words)) as loop:
            with loop.state.weights() as weights:
                loop.step()
                with loop.state.weights():
                    loop.step()
                seen = {name: weight.clone() for name, weight in weights.items()}
            check_released(loop, bool(each))
            with loop.state.weights() as weights:
                assert equal(weights, seen)
            found.append(seen)
    assert equal(*found)


def test_outside_of_that_they_read_as_nan_and_refuse_to_be_set() -> None:
    with assembled(config(*BFLOAT16, "parallel=none", SPLIT)) as loop:
        with loop.state.weights() as weights:
            before = {name: weight.clone() for name, weight in weights.items()}
        assert equal(weights, before)  # what was read inside stays
        trained = [*loop.state.trained_parameters().values()]
        for parameter in trained:
            assert copy.deepcopy(parameter).isnan().all()
            parameter.grad = torch.ones_like(parameter)
            with pytest.raises(RuntimeError):
                parameter.detach().zero_()
        for optimizer in (torch.optim.AdamW(trained, fused=True), torch.optim.AdamW(trained, foreach=True)):
            with pytest.raises(RuntimeError):
                optimizer.step()
        assert equal(whole(loop.state), {f"model.{name}": weight for name, weight in before.items()})


def test_an_optimizer_of_ones_own_updates_them() -> None:
    found = []
    for words in ((), (SPLIT,)):
        with assembled(config(*BFLOAT16, "parallel=none", *words)) as loop:
            loop.state.optimizer = torch.optim.RMSprop(loop.state.trained_parameters().values())
            loop.step()
            found.append(whole(loop.state))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.allclose(found[1][name], tensor, rtol=0.01, atol=0.1 * float(tensor.abs().max())), name
