"""Llamas as Hugging Face's own library writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.llamas import MakeLlama

transformers = pytest.importorskip("transformers", reason="the reference comes with the hf extra")

SIZES = {
    "vocab_size": 263,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "intermediate_size": 208,
    "max_position_embeddings": 40,
    "rms_norm_eps": 2e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20000.0},
}
"""Every number differs from every other, and from what is customary. The vocabulary is a prime, and uneven on all meshes."""


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> MakeLlama:
    """A folder of a Llama with random weights, norms included, that `save_pretrained` wrote."""

    def make(dtype: torch.dtype = torch.float32, shard: str = "5GB", **settings: Any) -> Path:
        torch.manual_seed(5)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **settings})).to(dtype)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
        folder = tmp_path_factory.mktemp("llama")
        model.save_pretrained(folder, max_shard_size=shard)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(make_llama: MakeLlama) -> Path:
    """In several files, with grouped queries."""
    folder = make_llama(shard="200KB")
    assert (folder / "model.safetensors.index.json").exists()
    return folder
