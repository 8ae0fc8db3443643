"""MPT, GPT's shape, as MosaicML's llm-foundry benchmarks it: LayerNorm, learned positions, one projection for queries,
keys and values, GELU, biases, and an output layer with the embedding's weight.

Shapes: b batch, s sequence, h width, n heads, d = h / n, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpresearch.models import Head


class Block(nn.Module):
    def __init__(self, dim: int, n_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.head_dim = dim // n_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h] -> [b, s, h]."""
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, -1, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class MPT(nn.Module):
    """Args: vocab_size: V. max_seq_len: greatest s. dim: h. n_layers: blocks. n_heads: n. ffn_dim: of the GELU."""

    def __init__(
        self, vocab_size: int, max_seq_len: int, dim: int, n_layers: int, n_heads: int, ffn_dim: int
    ) -> None:
        super().__init__()
        self.dim, self.n_layers = dim, n_layers
        self.tokens, self.positions = nn.Embedding(vocab_size, dim), nn.Embedding(max_seq_len, dim)
        self.layers = nn.ModuleList(Block(dim, n_heads, ffn_dim) for _ in range(n_layers))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        self.output.weight = self.tokens.weight

    def forward(self, tokens: Tensor, head: Head | None = None) -> Tensor:
        """tokens: [b, s] -> logits [b, s, V]."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)
        for layer in self.layers:
            x = layer(x)
        hidden = self.norm(x)
        return head(self.output, hidden) if head else self.output(hidden)

    def attention_flops_per_token(self, seq_len: int) -> float:
        """Forward and backward over the full square: 12 L h s (arXiv 2204.02311, app. B)."""
        return 12 * self.n_layers * self.dim * seq_len
