"""Models with parameters that are not plain float32 matrices: the toy language model with one twist."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import weight_norm as weight_norm_by_hook
from torch.nn.utils.parametrizations import weight_norm

from tpresearch.models.toy_mlp import ToyLM, ToyMLP


class Hooked(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.output.weight.register_hook(lambda gradient: 2 * gradient)


class Complex(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.output.weight = nn.Parameter(torch.empty(vocab_size, dim, dtype=torch.complex64))


class Wide(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.output.double()


class Transposed(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.output.weight = nn.Parameter(torch.empty(dim, vocab_size).t())


class Parametrized(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        weight_norm(self.output)


class NormalizedByHook(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        weight_norm_by_hook(self.output)


class InPlaceMLP(ToyMLP):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self.in_proj(x)
        hidden /= 8
        return self.out_proj(hidden.relu())


class InPlace(ToyLM):
    """Which selective checkpointing and tensor parallelism refuse, and no other plan."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.mlp = InPlaceMLP(dim, hidden_dim, dim)


class Counts(nn.Module):
    """With whole numbers and flags, which nothing may round."""

    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Parameter(torch.empty(8, dtype=torch.long), requires_grad=False)
        self.flags = nn.Parameter(torch.empty(8, dtype=torch.bool), requires_grad=False)

    def reset_parameters(self) -> None:
        self.offsets.fill_(1001)
        self.flags.fill_(True)

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.offsets - 1000)[0] * self.flags[0]


class Counting(ToyLM):
    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__(vocab_size, dim, hidden_dim)
        self.counts = Counts()

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return self.output(self.counts(self.mlp(self.embed(tokens))))


class ByKeyword(ToyLM):
    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        return self.output(input=self.mlp(self.embed(tokens)))


class Asking(ToyLM):
    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        hidden = self.mlp(self.embed(tokens))
        return self.output(hidden if hidden.sum() > 0 else -hidden)
