"""What Hugging Face calls each parameter of a Llama, and in which order it keeps the rows of the query and key projections."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
OUTSIDE = {"tok_embeddings.weight": EMBEDDING, "norm.weight": "model.norm.weight", "output.weight": OUTPUT}
IN_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}
LAYER = re.compile(r"layers\.(\d+)\.(.+)\.weight")
ROTATED = re.compile(r"layers\.\d+\.attention\.w[qk]\.weight")


def hugging_face_name(parameter: str) -> str | None:
    """`model.layers.0.mlp.gate_proj.weight` for `layers.0.feed_forward.w1.weight`; None for what a Llama does not have."""
    if (inside := LAYER.fullmatch(parameter)) and inside[2] in IN_LAYER:
        return f"model.layers.{inside[1]}.{IN_LAYER[inside[2]]}.weight"
    return OUTSIDE.get(parameter)


def is_rotated(parameter: str) -> bool:
    """Whether rotary positions turn what this parameter computes, so that Hugging Face has its rows in another order."""
    return ROTATED.fullmatch(parameter) is not None


def hugging_face_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Where Hugging Face keeps these rows of a query or key projection.

    Rotary positions turn pairs of features: neighbours as published and here, the two halves of a head there. So row
    2i + j of a head is row i + j d/2 of the same head there, in the key projection too, which has fewer heads of the
    same width d (arXiv 2104.09864; `permute` in transformers' convert_llama_weights_to_hf.py).

    rows: [n] indices into the projection's output. head_dim: d.
    """
    in_head = rows % head_dim
    return rows - in_head + in_head // 2 + in_head % 2 * (head_dim // 2)
