"""Llama2 as published (arXiv 2307.09288): RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases.

Shapes: b batch, s sequence, h width, f feed-forward width, n heads, k KV heads, d = h / n head width, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpresearch.models import Head


def clamped_normal_(weight: Tensor, std: float) -> None:
    """Draw from a normal clamped to +-3 std. Any part of a weight can be drawn alone, unlike with a truncated normal, which redraws."""
    nn.init.normal_(weight, std=std)
    with torch.no_grad():
        weight.clamp_(-3 * std, 3 * std)


class Linear(nn.Linear):
    """A projection without bias, with normal initial weights of a given std."""

    def __init__(self, in_features: int, out_features: int, std: float) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self) -> None:
        clamped_normal_(self.weight, self.std)


class Embedding(nn.Embedding):
    """An embedding with initial rows as small as a projection's, so that the residual stream starts small."""

    def reset_parameters(self) -> None:
        clamped_normal_(self.weight, 0.02)


def rotary_table(head_dim: int, seq_len: int, theta: float) -> Tensor:
    """cos and sin of the rotation angle of each position and pair of features (arXiv 2104.09864, eq. 34).

    Returns: [s, d/2, 2], float32.
    """
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), frequencies)
    return torch.stack((angles.cos(), angles.sin()), dim=-1).float()


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate each pair of adjacent features by its position's angle, in at least float32.

    Eager, a pair is a complex number, as each op reads and writes memory: two fifths of the bytes. The compiler, which knows no
    complex numbers, fuses what it is given. Both come to the same, to rounding.

    x: [b, s, n, d], rotary: [s, d/2, 2] -> [b, s, n, d]
    """
    wide = torch.promote_types(torch.promote_types(x.dtype, rotary.dtype), torch.float32)
    pairs, rotary = x.to(wide).unflatten(-1, (-1, 2)), rotary.to(wide)[:, None]
    if torch.compiler.is_compiling():
        cos, sin = rotary.unsqueeze(-2).unbind(-1)
        turned = pairs * cos + pairs.flip(-1) * torch.cat((-sin, sin), dim=-1)  # (-odd sin, even sin)
    else:
        turned = torch.view_as_real(as_complex(pairs) * as_complex(rotary))
    return turned.flatten(-2).type_as(x)


def as_complex(pairs: Tensor) -> Tensor:
    """The pairs along the last dim as complex numbers: a view, or a copy where they do not lie in memory as such. [..., 2] -> [...]"""
    *strides, within = pairs.stride()
    fits = within == 1 and not any(step % 2 for step in (*strides, pairs.storage_offset()))
    return torch.view_as_complex(pairs if fits else pairs.clone(memory_format=torch.contiguous_format))


class Attention(nn.Module):
    """Causal self-attention with n query heads that share k key and value heads (arXiv 2305.13245)."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, std: float, out_std: float) -> None:
        super().__init__()
        self.head_dim = dim // n_heads
        self.shares_kv = n_kv_heads != n_heads
        self.wq = Linear(dim, n_heads * self.head_dim, std)
        self.wk = Linear(dim, n_kv_heads * self.head_dim, std)
        self.wv = Linear(dim, n_kv_heads * self.head_dim, std)
        self.wo = Linear(n_heads * self.head_dim, dim, out_std)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """x: [b, s, h], rotary: [s, d/2, 2] -> [b, s, h]. The number of (local) heads follows from the projections' outputs."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate(q, rotary), rotate(k, rotary)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        shares_kv = self.shares_kv
        if shares_kv and q.is_cuda and q.dtype is torch.float32:
            # For shared heads torch has only its plain attention there, which keeps s x s probabilities (2.11).
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
            shares_kv = False
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=shares_kv)
        return self.wo(out.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim: int, ffn_dim: int, std: float, out_std: float) -> None:
        super().__init__()
        self.w1 = Linear(dim, ffn_dim, std)
        self.w2 = Linear(ffn_dim, dim, out_std)
        self.w3 = Linear(dim, ffn_dim, std)

    def forward(self, x: Tensor) -> Tensor:
        """x: [b, s, h] -> [b, s, h]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    def __init__(
        self,
        dim: int,
        n_heads: int,
        n_kv_heads: int,
        ffn_dim: int,
        norm_eps: float,
        std: float,
        out_std: float,
    ) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, norm_eps)
        self.attention = Attention(dim, n_heads, n_kv_heads, std, out_std)
        self.ffn_norm = nn.RMSNorm(dim, norm_eps)
        self.feed_forward = FeedForward(dim, ffn_dim, std, out_std)

    def forward(self, x: Tensor, rotary: Tensor) -> Tensor:
        """x: [b, s, h] -> [b, s, h]."""
        x = x + self.attention(self.attention_norm(x), rotary)
        return x + self.feed_forward(self.ffn_norm(x))


class Llama2(nn.Module):
    """Llama2, in the sizes of conf/model.

    Args:
        vocab_size: V. max_seq_len: maximum s. dim: h. n_layers: blocks. n_heads: n. n_kv_heads: k, dividing n.
        ffn_dim: f. norm_eps: added to the mean square. rope_theta: base of the rotary frequencies.
        init_std: std of the projections' initial weights; those that write to the residual stream start
            smaller by sqrt(2 n_layers), so that its size does not grow with depth (GPT-2).
        tied: whether the output layer has the embedding's weight (arXiv 1608.05859), as Llama2 itself does not.

    Raises:
        ValueError: if the sizes do not fit each other.
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
        norm_eps: float = 1e-5,
        rope_theta: float = 10000.0,
        init_std: float = 0.02,
        tied: bool = False,
    ) -> None:
        super().__init__()
        sizes = {"vocab_size": vocab_size, "max_seq_len": max_seq_len, "dim": dim, "n_layers": n_layers}
        sizes |= {"n_heads": n_heads, "n_kv_heads": n_kv_heads, "ffn_dim": ffn_dim}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} is not above 0")
        if dim % n_heads or dim // n_heads % 2:
            raise ValueError(f"dim={dim} does not split into n_heads={n_heads} heads of an even width")
        if n_heads % n_kv_heads:
            raise ValueError(f"n_heads={n_heads} is not a multiple of n_kv_heads={n_kv_heads}")
        self.dim, self.n_layers = dim, n_layers
        self._rotary_args = (dim // n_heads, max_seq_len, rope_theta)
        out_std = init_std / math.sqrt(2 * n_layers)
        self.tok_embeddings = Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(
            Block(dim, n_heads, n_kv_heads, ffn_dim, norm_eps, init_std, out_std) for _ in range(n_layers)
        )
        self.norm = nn.RMSNorm(dim, norm_eps)
        self.output = Linear(dim, vocab_size, init_std)
        if tied:
            self.output.weight = self.tok_embeddings.weight
        self.rotary: Tensor
        self.register_buffer("rotary", rotary_table(*self._rotary_args), persistent=False)

    def reset_buffers(self) -> None:
        """Fill the rotary table again, after the model was moved off the meta device."""
        self.rotary.copy_(rotary_table(*self._rotary_args))

    def forward(self, tokens: Tensor, head: Head | None = None) -> Tensor:
        """tokens: [b, s] -> logits [b, s, V], or what `head` makes of the last hidden state [b, s, h]."""
        x = self.tok_embeddings(tokens)
        rotary = self.rotary[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, rotary)
        hidden = self.norm(x)
        return head(self.output, hidden) if head else self.output(hidden)

    def attention_flops_per_token(self, seq_len: int) -> float:
        """Forward and backward of the two attention matmuls over the full square: 12 L h s (arXiv 2204.02311, app. B)."""
        return 12 * self.n_layers * self.dim * seq_len
