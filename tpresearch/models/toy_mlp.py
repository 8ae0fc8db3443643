"""The tutorial's toy network, by itself and between an embedding and an output layer."""

from __future__ import annotations

from torch import Tensor, nn

from tpresearch.models import Head


class ToyMLP(nn.Module):
    """in_proj -> ReLU -> out_proj: the pair of matmuls that Megatron-LM shards column-wise, then row-wise.

    With the defaults it is the tutorial's network of 517 parameters.
    """

    def __init__(self, dim: int = 10, hidden_dim: int = 32, out_dim: int = 5) -> None:
        super().__init__()
        if min(dim, hidden_dim, out_dim) < 1:
            raise ValueError(f"dim={dim}, hidden_dim={hidden_dim} and out_dim={out_dim} are not all above 0")
        self.in_proj = nn.Linear(dim, hidden_dim)
        self.relu = nn.ReLU()
        self.out_proj = nn.Linear(hidden_dim, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., dim] -> [..., out_dim]."""
        return self.out_proj(self.relu(self.in_proj(x)))


class ToyLM(nn.Module):
    """The toy network on tokens: each position predicts the next token from its own token alone."""

    def __init__(self, vocab_size: int, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim)
        self.mlp = ToyMLP(dim, hidden_dim, dim)
        self.output = nn.Linear(dim, vocab_size, bias=False)

    def forward(self, tokens: Tensor, head: Head | None = None) -> Tensor:
        """tokens: [b, s] -> logits [b, s, V], or what `head` makes of the last hidden state [b, s, h]."""
        hidden = self.mlp(self.embed(tokens))
        return head(self.output, hidden) if head else self.output(hidden)
