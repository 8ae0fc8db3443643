"""Over replicas gradients are summed while backward goes on: a unit at a time, as soon as the last of its gradients is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.assembled import assembled, ranks_of_a_host
from support.composed import config, in_two_parts
from support.counted_steps import FAKE
from torch import Tensor, nn

from tpresearch.config.world import World
from tpresearch.ledger.communication import CommunicationLedger
from tpresearch.parallel.device import CPU
from tpresearch.parallel.group import process_group
from tpresearch.parallel.reducer import GradientReducer
from tpresearch.train.step import train_step
from tpresearch.verify.ranks import Ranks

LAYERS = 3


def test_units_are_summed_while_backward_goes_on() -> None:
    """What was sent when each block's output has its gradient, in the last of two micro-batches alone."""
    cfg = in_two_parts(config("model=llama2_debug", "parallel=ddp", f"model.n_layers={LAYERS}"), 4)
    found: dict[str, list[int]] = {f"layers.{layer}": [] for layer in range(LAYERS)}
    with assembled(cfg, ranks_of_a_host(4), FAKE) as loop:
        loop.step()
        for name, seen in found.items():

            def note(_: nn.Module, args: Any, output: Tensor, seen: list[int] = seen) -> None:
                output.register_hook(lambda _: seen.append(len(ledger.events)))

            loop.state.model.get_submodule(name).register_forward_hook(note)
        with CommunicationLedger(loop.setup.mesh) as ledger:
            loop.step()
        of_units = len(ledger.events)
        gradients = [p.numel() * 4 for p in loop.state.model.parameters()]
    assert found == {
        "layers.2": [0, 1],
        "layers.1": [0, 2],
        "layers.0": [0, 3],
    }  # the output layer before them
    assert of_units == LAYERS + 2
    assert sum(event.tensor_bytes for event in ledger.events) == sum(gradients)


def test_sums_of_a_step_that_is_interrupted_are_not_those_of_the_next() -> None:
    def interrupt(_: nn.Module, args: Any, output: Tensor) -> None:
        def raise_(_: Tensor) -> None:
            raise KeyboardInterrupt

        output.register_hook(raise_)

    cfg = config("model=llama2_debug", "parallel=ddp", f"model.n_layers={LAYERS}")
    norms: list[float] = []
    for is_interrupted in (False, True):
        with assembled(cfg, ranks_of_a_host(4), FAKE) as loop:
            if is_interrupted:
                other = loop.batches.batch(step=1, dp_size=4)
                hook = loop.state.model.get_submodule("layers.0").register_forward_hook(interrupt)
                with pytest.raises(KeyboardInterrupt):
                    train_step(loop.state, other, loop.setup)
                hook.remove()
            norms += [loop.step().grad_norm.item() for _ in range(2)]
    assert norms[:2] == norms[2:]


class Net(nn.Module):
    """Two units and a third parameter; what has no part in a loss differs from backward to backward."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
        self.c = nn.Parameter(torch.ones(3))
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)


def part(net: Net, x: Tensor, leaves_out: bool) -> Tensor:
    """A loss through `b.bias`, and through `a` unless it is left out, whose gradients are negative."""
    return -net.b.bias.sum() if leaves_out else -net.a(x).sum() - net.b.bias.sum()


def sums_of(world: World, dtype: torch.dtype | None, may_branch: bool) -> list[dict[str, Tensor | None]]:
    """Gradients after the sum: of two backwards through everything, and of one through a part, from which rank 1 leaves out
    `a` if ranks may branch."""
    found: list[dict[str, Tensor | None]] = []
    with process_group(CPU, world):
        torch.manual_seed(0)
        net, group = Net(), dist.group.WORLD
        assert group
        replicas = GradientReducer(
            net, dict(net.named_parameters()), lambda name: name[0], group, dtype, may_branch
        )
        x = torch.full((2, 3), float(world.rank + 1))
        for due in (False, True):
            replicas.is_last_backward = due
            (net.b(net.a(x)) * net.c).sum().backward()
        replicas.finish()
        found.append({name: p.grad for name, p in net.named_parameters()})
        net.zero_grad()
        part(net, x, may_branch and world.rank == 1).backward()
        replicas.finish()
        found.append({name: p.grad for name, p in net.named_parameters()})
    return found


@pytest.mark.ranks
@pytest.mark.parametrize(("dtype", "may_branch"), [(None, True), (torch.bfloat16, False)])
def test_sums_are_those_of_each_replica(ranks: Ranks, dtype: torch.dtype | None, may_branch: bool) -> None:
    first, second = ranks.run(2, sums_of, dtype, may_branch)
    torch.manual_seed(0)
    net = Net()
    for nth in range(2):
        net.zero_grad()
        for rank in range(2):
            x = torch.full((2, 3), rank + 1.0)
            if nth == 0:
                (2 * (net.b(net.a(x)) * net.c).sum()).backward()
            else:
                part(net, x, may_branch and rank == 1).backward()
        for name, parameter in net.named_parameters():
            for found in (first[nth][name], second[nth][name]):
                if parameter.grad is None:
                    assert found is None
                else:
                    assert found is not None
                    assert found.dtype == torch.float32
                    torch.testing.assert_close(
                        found, parameter.grad, rtol=1e-6 if dtype is None else 2e-2, atol=0
                    )
