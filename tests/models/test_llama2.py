"""Llama2 against Hugging Face's implementation with the same weights, and against published sizes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from support.composed import config
from torch import Tensor

from tpresearch.models.llama2 import Llama2, rotary_table, rotate
from tpresearch.models.toy_mlp import ToyMLP
from tpresearch.plan.meta import meta_model
from tpresearch.train.speed import flops_per_token


def interleaved_to_halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of a q or k projection from the published order (pairs of neighbours) to Hugging Face's (two halves)."""
    out, width = weight.shape
    return weight.view(heads, out // heads // 2, 2, width).transpose(1, 2).reshape(out, width)


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_it_computes_what_hugging_face_computes(kv_heads: int) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference comes with the hf extra")
    torch.manual_seed(0)
    ours = Llama2(
        vocab_size=97, max_seq_len=24, dim=64, n_layers=2, n_heads=8, n_kv_heads=kv_heads, ffn_dim=112
    ).double()
    ours.rotary.copy_(ours.rotary)
    reference = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=kv_heads,
            intermediate_size=112,
            rms_norm_eps=1e-5,
            max_position_embeddings=24,
            attn_implementation="eager",
        )
    ).double()
    names = {
        "tok_embeddings.weight": "model.embed_tokens.weight",
        "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
    }
    parts = {
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj",
        "feed_forward.w3": "mlp.up_proj",
    }
    for layer in range(2):
        names |= {f"layers.{layer}.{a}.weight": f"model.layers.{layer}.{b}.weight" for a, b in parts.items()}
    state = {}
    for name, weight in ours.state_dict().items():
        heads = 8 if "wq" in name else kv_heads
        state[names[name]] = interleaved_to_halves(weight, heads) if "wq" in name or "wk" in name else weight
    reference.load_state_dict(state)
    tokens = torch.randint(0, 97, (3, 24))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), reference(tokens).logits, rtol=1e-5, atol=1e-6)


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


PUBLISHED = {
    "llama2_1b": 1_100_048_384,  # TinyLlama's layout
    "llama2_7b": 6_738_415_616,
    "llama2_13b": 13_015_864_320,
    "llama2_70b": 68_976_648_192,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name: str) -> None:
    model = meta_model(config(f"model={name}", "tokenizer=bpe_32k", small=False).model)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[name]


def test_small_is_110_to_160_million_with_either_vocabulary() -> None:
    for tokenizer in ("bpe", "bpe_32k"):
        model = meta_model(config("model=llama2_small", f"tokenizer={tokenizer}", small=False).model)
        assert 110e6 < sum(p.numel() for p in model.parameters()) < 165e6


def test_the_bare_toy_network_is_the_tutorials() -> None:
    assert sum(p.numel() for p in ToyMLP().parameters()) == 517


def test_flops_of_7b_by_hand() -> None:
    model = meta_model(config("model=llama2_7b", "tokenizer=bpe_32k", small=False).model)
    n = 6_738_415_616 - 32_000 * 4096
    assert flops_per_token(model, 4096, causal=False) == 6 * n + 12 * 32 * 4096 * 4096
    assert flops_per_token(model, 4096, causal=True) == 6 * n + 6 * 32 * 4096 * 4096
