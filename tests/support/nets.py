"""Models that people bring, each the toy language model with one twist; its sharding plans fit them all."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torch.utils.checkpoint import checkpoint

from tpresearch.models import Head
from tpresearch.models.toy_mlp import ToyLM, ToyMLP


class Tied(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.output.weight = self.embed.weight


class Recurrent(ToyLM):
    """One block at each of three depths, as ALBERT has it."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.deeper = nn.ModuleList([self.mlp] * 2)

    def forward(self, tokens: Tensor, head: Head | None = None) -> Tensor:
        hidden = self.mlp(self.embed(tokens))
        for block in self.deeper:
            hidden = hidden + block(hidden)
        return head(self.output, hidden) if head else self.output(hidden)


class OwnCheckpoints(ToyLM):
    """Whose norm and output layer run in a checkpoint of the model's own."""

    reentrant = True

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        hidden = self.mlp(self.embed(tokens))
        return checkpoint(lambda x: self.output(self.norm(x)), hidden, use_reentrant=self.reentrant)


class NotReentrant(OwnCheckpoints):
    reentrant = False


class TiedInCheckpoints(OwnCheckpoints):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.output.weight = self.embed.weight


class RecurrentInCheckpoints(Recurrent):
    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        hidden = self.embed(tokens)
        for block in (self.mlp, *self.deeper):
            hidden = hidden + checkpoint(block, hidden, use_reentrant=True)
        return self.output(hidden)


class Frozen(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.embed.weight.requires_grad_(False)
        self.mlp.out_proj.bias.requires_grad_(False)


class FrozenBlock(ToyLM):
    """Whose embedding and output layer learn alone."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.mlp.requires_grad_(False)


class FrozenLayers(FrozenBlock):
    """Whose embedding learns alone."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.output.requires_grad_(False)


class AllFrozen(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.requires_grad_(False)


class Dropped(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.drop = nn.Dropout(0.5)

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return self.output(self.mlp(self.drop(self.embed(tokens))))


class Thinned(ToyLM):
    """Dropout within the block, on what tensor-parallel ranks have a shard of, and on what they have whole."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.set_submodule("mlp.relu", nn.Dropout(0.5))
        self.set_submodule("mlp.out_proj", nn.Sequential(self.mlp.out_proj, nn.Dropout(0.25)))


class ThinnedByHand(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.set_submodule("mlp.relu", HandMadeDropout())


class RandomlyLeaky(ToyLM):
    """Whose activation has a random slope at each place."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.set_submodule("mlp.relu", nn.RReLU())


class HandMadeDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.empty(()))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.s, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.s


class Scaled(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.scale = Scale()

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return self.output(self.scale(self.mlp(self.embed(tokens))))


class Unused(ToyLM):
    """With a layer that no forward reaches, so that it never has a gradient."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.unused = nn.Linear(dim, dim)


class Buffered(ToyLM):
    """With a buffer that its training changes and its checkpoint has to hold, and one with infinity in it, as an attention mask has."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("mask", torch.empty(2, 2))

    def reset_buffers(self) -> None:
        self.seen.zero_()
        self.mask.fill_(-math.inf).triu_(1)

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        if self.training:
            self.seen += 1
        return self.output(self.mlp(self.embed(tokens))) / (1 + self.seen)


class Counting(ToyLM):
    """That counts its calls in Python, as for a part that sets in slowly."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.calls = 0

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        self.calls += self.training
        return self.output(self.mlp(self.embed(tokens)) * min(1.0, self.calls / 100))


class ReadApart(ToyLM):
    """That reads a weight of its block where the block does not run."""

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return self.output(self.mlp(self.embed(tokens)) * self.mlp.in_proj.weight.std())


class Forced(ToyLM):
    """Whose features move along the gradient of an energy."""

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        x = self.embed(tokens)
        with torch.enable_grad():
            x = x if x.requires_grad else x.requires_grad_()
            (force,) = torch.autograd.grad(self.mlp(x).square().sum(), x, create_graph=self.training)
        return self.output(x + force)


class TwoBlocks(ToyLM):
    """Each called by `call`."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.first = ToyMLP(dim, hidden_dim, dim)

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return self.output(self.call(self.mlp, self.call(self.first, self.embed(tokens))))

    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        return block(x)


class ByGrad(TwoBlocks):
    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            return x + torch.autograd.grad(block(y).square().sum(), y, create_graph=True)[0]


class ByFuncGrad(TwoBlocks):
    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        return x + torch.func.grad(lambda y: block(y).square().sum())(x)


class ByJvp(TwoBlocks):
    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        return torch.func.jvp(block, (x,), (x,))[1]


class ByVmap(TwoBlocks):
    def call(self, block: nn.Module, x: Tensor) -> Tensor:
        return torch.func.vmap(block)(x)


class Projected(ToyLM):
    """With a random projection that is drawn once."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.projection: Tensor
        self.register_buffer("projection", torch.empty(dim, dim), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        self.projection.normal_()

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return self.output(self.mlp((self.embed(tokens) @ self.projection).cos()))


class ReadTwice(ToyLM):
    """Whose table is read a second time, without a call of its module."""

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        hidden = self.mlp(self.embed(tokens))
        return self.output(hidden) + F.linear(hidden, self.embed.weight)


class EvenEmbedding(nn.Embedding):
    """Rows of one length: its backward reads the weight again."""

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, 8 * F.normalize(self.weight, dim=-1))


class Normalized(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.embed = EvenEmbedding(vocab_size, dim)


def model(kind: type[nn.Module]) -> list[str]:
    """The overrides that make it the model of a config."""
    return ["model=toy_mlp", f"model._target_={kind.__module__}.{kind.__name__}"]


class ComplexPositions(ToyLM):
    """Rotary positions as published: a table of complex numbers."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.turns: Tensor
        self.register_buffer("turns", torch.empty(64, dim // 2, dtype=torch.complex64), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        angles = torch.outer(torch.arange(64.0), 1 / torch.arange(1, self.turns.shape[1] + 1))
        self.turns.copy_(torch.polar(torch.ones_like(angles), angles))

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        pairs = torch.view_as_complex(self.mlp(self.embed(tokens)).unflatten(-1, (-1, 2)))
        turned = pairs * self.turns[: tokens.shape[1]]
        real = (
            torch.view_as_real(turned) if turned.is_complex() else turned.unsqueeze(-1).expand(-1, -1, -1, 2)
        )
        return self.output(real.flatten(-2))


class HookedHead(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.output.register_forward_hook(lambda _, args, output: output / 4)


class PartlyInEvaluation(ToyLM):
    """With dropout that is always off, as in a part that is no longer trained."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.drop = nn.Dropout(0.5).eval()

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return self.output(self.drop(self.mlp(self.embed(tokens))))


class Gated(nn.Linear):
    def __init__(self, dim: int) -> None:
        super().__init__(dim, dim)
        self.gate = nn.Linear(dim, dim)

    def forward(self, input: Tensor) -> Tensor:
        return self.gate(input) * super().forward(input)


class AfterBlocks(ToyLM):
    """With layers after the block, of which one has another within it, one is also called before the block, and one in training alone."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.before, self.twice = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.gated, self.in_training = Gated(dim), nn.Linear(dim, dim)

    def forward(self, tokens: Tensor, head: Head | None = None) -> Tensor:
        hidden = self.gated(self.twice(self.mlp(self.twice(self.before(self.embed(tokens))))))
        if self.training:
            hidden = self.in_training(hidden)
        return head(self.output, hidden) if head else self.output(hidden)


class Routed(ToyLM):
    """Each token goes to one of many experts, of which a rank's rows may reach some alone."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.experts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(64))

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        x, chosen = self.mlp(self.embed(tokens)), tokens % len(self.experts)
        y = x
        for index in chosen.unique().tolist():
            y = y.index_put((chosen == index,), self.experts[index](x[chosen == index]))
        return self.output(x + y)


class AddsInPlace(ToyLM):
    """Two blocks, and a sum into the output of the first."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.first = ToyMLP(dim, hidden_dim, dim)

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        embedded = self.embed(tokens)
        hidden = self.first(embedded)
        hidden += embedded
        return self.output(self.mlp(hidden))


class Positions(ToyLM):
    """With learned positions, [s, h]."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.positions = nn.Embedding(64, dim)

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        x = self.embed(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.output(self.mlp(x))


class InFront(ToyLM):
    """With a token in front of each row, as a class token or a register."""

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        x = self.embed(tokens)
        return self.output(self.mlp(torch.cat((x[:, :1], x), dim=1)))[:, 1:]


class NoStyle(ParallelStyle):
    """One of a user's own, that does nothing."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return module


class TakesLayouts(NoStyle):
    """The same, with layouts among its arguments."""

    def __init__(self, dst: list[str | None], src: str = "unset") -> None:
        super().__init__()
        self.dst, self.src = dst, src
