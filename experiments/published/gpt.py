"""GPT's shape, as MosaicML's MPT, Megatron-LM, Pythia or Falcon have it: LayerNorm, one projection for queries, keys and
values, GELU, biases; positions learned, rotary or none; an output layer that may have the embedding's weight.

Shapes: b batch, s sequence, h width, n heads, k KV heads, g = n / k, d = h / n, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpresearch.models import Head
from tpresearch.models.llama2 import rotary_table, rotate


class Block(nn.Module):
    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, ffn_dim: int) -> None:
        super().__init__()
        self.head_dim, self.per_group = dim // n_heads, n_heads // n_kv_heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, dim + 2 * n_kv_heads * self.head_dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, ffn_dim), nn.Linear(ffn_dim, dim)

    def forward(self, x: Tensor, rotary: Tensor | None) -> Tensor:
        """x: [b, s, h], rotary: [s, d/2, 2] -> [b, s, h]."""
        # Rows of qkv are ordered by KV head, as Megatron-LM has them, so that a rank's rows are whole heads.
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (-1, self.per_group + 2, self.head_dim))
        *queries, k, v = qkv.permute(3, 0, 2, 1, 4)
        q = torch.stack(queries, dim=2).flatten(1, 2) if len(queries) > 1 else queries[0]
        if rotary is not None:
            q, k = (rotate(t.transpose(1, 2), rotary).transpose(1, 2) for t in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=len(queries) > 1)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class GPT(nn.Module):
    """Args:
        vocab_size: V. max_seq_len: greatest s. dim: h. n_layers: blocks. n_heads: n. n_kv_heads: k. ffn_dim: of the GELU.
        positions: learned, rope, or none. tied: whether the output layer has the embedding's weight.

    Raises:
        ValueError: if the heads do not fit the width or each other, or positions is none of these.
    """

    def __init__(
        self,
        vocab_size: int,
        max_seq_len: int,
        dim: int,
        n_layers: int,
        n_heads: int,
        n_kv_heads: int,
        ffn_dim: int,
        positions: str = "learned",
        tied: bool = True,
    ) -> None:
        super().__init__()
        if dim % n_heads or n_heads % n_kv_heads:
            raise ValueError(
                f"dim={dim}, n_heads={n_heads} and n_kv_heads={n_kv_heads} do not divide each other"
            )
        if positions not in ("learned", "rope", "none"):
            raise ValueError(f"positions={positions} is none of learned, rope, none")
        self.dim, self.n_layers = dim, n_layers
        self._rotary_args = (dim // n_heads, max_seq_len, 10000.0)
        self.tokens = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(max_seq_len, dim) if positions == "learned" else None
        self.layers = nn.ModuleList(Block(dim, n_heads, n_kv_heads, ffn_dim) for _ in range(n_layers))
        self.norm = nn.LayerNorm(dim)
        self.output = nn.Linear(dim, vocab_size, bias=False)
        if tied:
            self.output.weight = self.tokens.weight
        self.rotary: Tensor | None
        table = rotary_table(*self._rotary_args) if positions == "rope" else None
        self.register_buffer("rotary", table, persistent=False)

    def reset_buffers(self) -> None:
        """Fill the rotary table again, after the model was moved off the meta device."""
        if self.rotary is not None:
            self.rotary.copy_(rotary_table(*self._rotary_args))

    def forward(self, tokens: Tensor, head: Head | None = None) -> Tensor:
        """tokens: [b, s] -> logits [b, s, V]."""
        length = tokens.shape[1]
        x = self.tokens(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(length, device=tokens.device)[None])
        rotary = None if self.rotary is None else self.rotary[:length]
        for layer in self.layers:
            x = layer(x, rotary)
        hidden = self.norm(x)
        return head(self.output, hidden) if head else self.output(hidden)

    def attention_flops_per_token(self, seq_len: int) -> float:
        """Forward and backward over the full square: 12 L h s (arXiv 2204.02311, app. B)."""
        return 12 * self.n_layers * self.dim * seq_len
