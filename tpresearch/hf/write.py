"""A Hugging Face folder written from whole tensors that come one at a time: weights in several files, then config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tpresearch.config.errors import ConfigError
from tpresearch.hf.files import INDEX, WEIGHTS
from tpresearch.hf.names import hugging_face_name, hugging_face_rows, is_rotated
from tpresearch.hf.settings import CONFIG, config_json

SHARD_BYTES = 4 * 10**9
"""Of a file of weights, and so about the memory that writing takes."""

Read = Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]
"""Whole parameters by name, one at a time."""


def write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    read: Read,
    head_dim: int,
    dtype: torch.dtype,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write every parameter, the index too where they take more than one file.

    Args:
        sizes: numbers in each parameter, by our names, in the order in which they are written. head_dim: d.

    Raises:
        ConfigError: naming dtype, for a number that it cannot hold.
    """
    shards = list(_shards(sizes, shard_bytes // dtype.itemsize))
    files: dict[str, str] = {}
    for nth, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{nth:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for name, tensor in read(names):
            there = hugging_face_name(name)
            assert there
            tensors[there] = _converted(name, tensor, head_dim, dtype)
        save_file(tensors, folder / file, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = {"total_size": sum(sizes.values()) * dtype.itemsize}
        write_json(folder / INDEX, {"metadata": total, "weight_map": files})


def write_config(
    folder: Path, settings: Mapping[str, Any], dtype: torch.dtype, bos: int | None, eos: int | None
) -> None:
    """Write config.json and generation_config.json: what transformers reads first. See `settings.config_json`."""
    ids = {"bos_token_id": bos, "eos_token_id": eos}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    write_json(folder / CONFIG, config_json(settings, str(dtype).removeprefix("torch."), bos, eos))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, int], most: int) -> Iterator[Sequence[str]]:
    """Neighbouring parameters of at most so many numbers together; a larger one alone."""
    names: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if names and filled + size > most:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += size
    yield names


def _converted(name: str, tensor: Tensor, head_dim: int, dtype: torch.dtype) -> Tensor:
    """A parameter in the order of rows and the dtype that it is written in."""
    if is_rotated(name):
        rows = hugging_face_rows(torch.arange(len(tensor)), head_dim)
        tensor = torch.empty_like(tensor).index_copy_(0, rows, tensor)
    narrow = tensor.to(dtype)
    if not torch.isfinite(narrow).all():
        most = f"{float(tensor.abs().max()):.3g}"
        legal = "bfloat16, which has the range of float32, or the checkpoint's own"
        kind = str(dtype).removeprefix("torch.")
        raise ConfigError("dtype", kind, f"{name} has numbers up to {most}, too large for it", legal)
    return narrow.contiguous()
