"""Hugging Face's names of a Llama's settings and parameters, and its row order of the query and key projections.

Nothing here imports torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tpresearch.config.errors import ConfigError, format_value

if TYPE_CHECKING:
    from torch import Tensor

CONFIG = "config.json"
SIZE_SETTINGS = {
    "vocab_size": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "ffn_dim": "intermediate_size",
}
"""Our settings that are counts, and what config.json calls them."""
FLOAT_SETTINGS = {"norm_eps": "rms_norm_eps", "rope_theta": "rope_theta", "init_std": "initializer_range"}
SETTING_NAMES = {**SIZE_SETTINGS, **FLOAT_SETTINGS, "tied": "tie_word_embeddings"}
CONFIG_DEFAULTS = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 10000.0}
CONFIG_DEFAULTS |= {"initializer_range": 0.02}
"""Defaults of transformers for keys that config.json does not have (LlamaConfig, 4.0 to 5.23)."""
REQUIRED_VALUES = {
    "model_type": "llama",
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "partial_rotary_factor": 1,
    "sliding_window": None,
    "quantization_config": None,
}
"""Keys of config.json for which our model has no setting: they must have this value, or be absent."""
IRRELEVANT_TO_WEIGHTS = ("max_seq_len", "init_std")
"""Settings that do not change what given weights compute from a row."""
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
MODEL_NAMES = {
    "tok_embeddings.weight": EMBEDDING,
    "norm.weight": "model.norm.weight",
    "output.weight": OUTPUT,
}
LAYER_NAMES = {
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
LEGAL = "a folder or hub id of a Llama with config.json and model.safetensors, or a tpresearch checkpoint"
LAYER_PARAMETER = re.compile(r"layers\.(\d+)\.(.+)\.weight")
ROTARY_PARAMETER = re.compile(r"layers\.\d+\.attention\.w[qk]\.weight")


def read_settings(folder: Path, named: str) -> dict[str, Any]:
    """The settings of our model that compute what this folder's config.json describes.

    Args:
        named: what the user called the folder: a path or a hub id.

    Raises:
        ConfigError: for what our model cannot compute, by its name in config.json.
    """
    config = _read_config(folder / CONFIG, named)
    config |= _rope(config, named)
    for key, legal in REQUIRED_VALUES.items():
        value = config.get(key, None if key == "model_type" else legal)
        if value != legal and (value is not None or key == "model_type"):
            raise _not_implemented(named, key, value)
    settings: dict[str, Any] = {ours: _count(config, theirs, named) for ours, theirs in SIZE_SETTINGS.items()}
    settings |= {ours: _number(config, theirs, named) for ours, theirs in FLOAT_SETTINGS.items()}
    tied = settings["tied"] = config.get("tie_word_embeddings", False)
    if not isinstance(tied, bool):
        raise folder_error(named, f"{CONFIG} has tie_word_embeddings={tied}", "true or false there")
    head_dim = config.get("head_dim")
    if head_dim is not None and head_dim * settings["n_heads"] != settings["dim"]:
        raise _not_implemented(named, "head_dim", head_dim)
    return settings


def check_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any], named: str) -> None:
    """Refuse weights for a model that computes something else with them.

    Args:
        theirs: what `read_settings` found in the folder. ours: the model's, including the defaults of its class.

    Raises:
        ConfigError: for the first setting that differs.
    """
    for key, value in theirs.items():
        if key not in ours:
            why = f"it holds a Llama, but this model has no setting {key}"
            legal = "model=hf, or a llama2_* of the same sizes"
            raise ConfigError("init_from", named, why, legal, fix={"init_from": named, "model": "hf"})
        if key not in IRRELEVANT_TO_WEIGHTS and ours[key] != value:
            why = f"{CONFIG} of {named} has {SETTING_NAMES[key]}={format_value(value)}"
            legal = f"{format_value(value)}, or model=hf, which takes its settings from there"
            fix = {"model": "hf", f"model.{key}": None}
            raise ConfigError(f"model.{key}", ours[key], why, legal, fix=fix)


def config_json(settings: Mapping[str, Any], dtype: str, bos: int | None, eos: int | None) -> dict[str, Any]:
    """The content of config.json for a model with these settings.

    Args:
        bos, eos: token ids. Both are always stated: left out, transformers would take 1 and 2.
    """
    return {
        "architectures": ["LlamaForCausalLM"],
        **{key: REQUIRED_VALUES[key] for key in ("model_type", "hidden_act", "attention_bias", "mlp_bias")},
        **{theirs: settings[ours] for ours, theirs in SIZE_SETTINGS.items()},
        **{theirs: float(settings[ours]) for ours, theirs in FLOAT_SETTINGS.items()},
        "tie_word_embeddings": settings["tied"],
        "bos_token_id": bos,
        "eos_token_id": eos,
        "torch_dtype": dtype,
    }


def _read_config(path: Path, named: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        legal = "a folder that transformers can read, or a tpresearch run or checkpoint"
        raise folder_error(named, f"it has no {CONFIG}", legal) from None
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise folder_error(named, f"{CONFIG} cannot be read: {why}", "a readable one") from None
    if not isinstance(config, dict):
        raise folder_error(named, f"{CONFIG} is not an object", "that of a LlamaForCausalLM")
    return config


def _rope(config: Mapping[str, Any], named: str) -> dict[str, Any]:
    """Rotary settings: in `rope_parameters` since transformers 5, before that in `rope_scaling` and at the top."""
    rope: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        found = config.get(key) or {}
        if not isinstance(found, dict) or found.get("rope_type", found.get("type", "default")) != "default":
            raise _not_implemented(named, key, found)
        rope |= {name: found[name] for name in ("rope_theta", "partial_rotary_factor") if name in found}
    return rope


def _count(config: Mapping[str, Any], key: str, named: str) -> int:
    value = config.get(key, CONFIG_DEFAULTS.get(key))
    if value is None and key == "num_key_value_heads":
        value = config.get("num_attention_heads")
    if type(value) is not int or value < 1:
        said = f"{CONFIG} has no {key}" if value is None else f"{CONFIG} has {key}={format_value(value)}"
        raise folder_error(named, said, f"a whole number in {key}")
    return value


def _number(config: Mapping[str, Any], key: str, named: str) -> float:
    value = config.get(key, CONFIG_DEFAULTS[key])
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise folder_error(named, f"{CONFIG} has {key}={format_value(value)}", f"a number above 0 in {key}")
    return float(value)


def _not_implemented(named: str, key: str, value: object) -> ConfigError:
    why = f"{CONFIG} has {key}={format_value(value)}, which our Llama2 does not implement"
    legal = "left out" if (only := REQUIRED_VALUES.get(key)) is None else f"{format_value(only)} or left out"
    return folder_error(named, why, f"a Llama with {key} {legal}")


def folder_error(named: str, why: str, legal: str = LEGAL) -> ConfigError:
    return ConfigError("init_from", named, why, legal)


def hugging_face_name(parameter: str) -> str | None:
    """`model.layers.0.mlp.gate_proj.weight` for `layers.0.feed_forward.w1.weight`; None for what a Llama does not have."""
    if (inside := LAYER_PARAMETER.fullmatch(parameter)) and inside[2] in LAYER_NAMES:
        return f"model.layers.{inside[1]}.{LAYER_NAMES[inside[2]]}.weight"
    return MODEL_NAMES.get(parameter)


def has_rotary_rows(parameter: str) -> bool:
    """Whether rotary positions rotate this parameter's output, so that Hugging Face has its rows in another order."""
    return ROTARY_PARAMETER.fullmatch(parameter) is not None


def hugging_face_rows(rows: Tensor, head_dim: int) -> Tensor:
    """Where Hugging Face keeps these rows of a query or key projection.

    Rotary positions turn pairs of features: neighbours as published and here, the two halves of a head there. So row
    2i + j of a head is row i + j d/2 of the same head there, in the key projection too, which has fewer heads of the
    same width d (arXiv 2104.09864; `permute` in transformers' convert_llama_weights_to_hf.py).

    rows: [n] indices into the projection's output. head_dim: d.
    """
    in_head = rows % head_dim
    return rows - in_head + in_head // 2 + in_head % 2 * (head_dim // 2)
