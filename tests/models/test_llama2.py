"""Rotary positions, and published sizes; tests/hf/test_read.py compares logits with Hugging Face's Llama."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.assembled import planned

from tpresearch.models.llama2 import rotary_table, rotate
from tpresearch.models.toy_mlp import ToyMLP


def test_turning_keeps_lengths_and_depends_on_distance_alone() -> None:
    table = rotary_table(8, 16, 10000.0).double()
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64).expand(2, 1, 16, 1, 8)
    turned_q, turned_k = rotate(q, table)[0, :, 0], rotate(k, table)[0, :, 0]
    torch.testing.assert_close(turned_q.norm(dim=-1), q[0, :, 0].norm(dim=-1), rtol=1e-6, atol=0)
    products = turned_q @ turned_k.T
    torch.testing.assert_close(products[5, 2], products[13, 10], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [8, 64])
def test_a_compiler_is_given_real_numbers_that_come_to_the_same(dtype: torch.dtype, head_dim: int) -> None:
    torch.manual_seed(0)
    x, table = torch.randn(2, 6, 3, head_dim, dtype=dtype), rotary_table(head_dim, 6, 10000.0)
    compiled = torch.compile(rotate, backend="aot_eager")(x, table)
    torch.testing.assert_close(compiled, rotate(x, table), rtol=2 * torch.finfo(dtype).eps, atol=3e-7)


LAID_OUT = {
    "features before heads": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "rows of an odd width": lambda x: F.pad(x.flatten(-2), (0, 1))[..., :-1].unflatten(-1, x.shape[-2:]),
    "from an odd place": lambda x: F.pad(x.flatten(-2), (1, 1))[..., 1:-1].unflatten(-1, x.shape[-2:]),
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("layout", LAID_OUT)
def test_positions_are_turned_wherever_features_lie_in_memory(layout: str) -> None:
    x, table = torch.randn(2, 6, 3, 8), rotary_table(8, 6, 10000.0)
    torch.testing.assert_close(rotate(LAID_OUT[layout](x), table), rotate(x, table), rtol=1e-5, atol=1e-6)
    cos_and_sin = table.movedim(-1, 0).contiguous().movedim(0, -1)
    torch.testing.assert_close(rotate(x, cos_and_sin), rotate(x, table), rtol=1e-5, atol=1e-6)


def weights(vocabulary: int, dim: int, layers: int, kv_dim: int, ffn_dim: int) -> int:
    """Of embedding and output, of each layer's attention, feed-forward and two norms, and of the last norm."""
    of_layer = 2 * dim * (dim + kv_dim) + 3 * dim * ffn_dim + 2 * dim
    return 2 * vocabulary * dim + layers * of_layer + dim


COUNTS = {
    "llama2_1b": 1_100_048_384,  # TinyLlama's layout
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
    "llama2_small": weights(32_000, 768, 16, 768, 2048),
    "llama2_tiny": weights(32_000, 256, 2, 256, 768),
    "llama2_debug": weights(32_000, 64, 2, 32, 192),
    "toy_mlp": 2 * 32_000 * 64 + 2 * 64 * 256 + 256 + 64,
}
"""As published, or by hand."""


@pytest.mark.parametrize("name", COUNTS)
def test_every_model_has_as_many_parameters_as_its_name_says_and_a_plan(name: str) -> None:
    tp = 4 if name in ("llama2_small", "llama2_1b", "llama2_debug") else 8  # 12 heads; 4 KV heads
    model, plan = planned(f"model={name}", "tokenizer.vocab_size=32000", f"mesh.tp={tp}")
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]
    assert plan.sizes.nontrivial() == {"tp": tp}


def test_the_bare_toy_network_is_the_tutorials() -> None:
    assert sum(p.numel() for p in ToyMLP().parameters()) == 517
