"""Export of a checkpoint as a Hugging Face folder, without ranks and without holding a whole model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from tpresearch.checkpoint.collective import RankFailed
from tpresearch.checkpoint.disk import BrokenCheckpoint, Checkpoint, sync
from tpresearch.checkpoint.load import read_tensors, tensors_of, verify
from tpresearch.checkpoint.resume import run_of
from tpresearch.checkpoint.state import MODEL
from tpresearch.config.errors import WRITABLE, ConfigError
from tpresearch.config.model import model_config
from tpresearch.data.tokenizer import TOKENIZER_FOLDER, special_ids
from tpresearch.hf.files import INDEX, WEIGHTS
from tpresearch.hf.llama import (
    CONFIG,
    SETTING_NAMES,
    config_json,
    has_rotary_rows,
    hugging_face_name,
    hugging_face_rows,
)
from tpresearch.plan.meta import meta_model, settings_with_defaults

SHARD_BYTES = 4 * 10**9
"""Maximum size of a file of weights, and so about the memory that writing takes."""
ReadParameters = Callable[[Iterable[str]], Iterator[tuple[str, Tensor]]]
"""Whole parameters by name, one at a time."""


def export(checkpoint: Checkpoint, out: Path, dtype: str | None = None) -> str:
    """Write a checkpoint as a Hugging Face folder, which appears complete or not at all; returns a summary.

    Args:
        out: a folder that does not exist. dtype: torch's name of one, for the weights; None for that of the checkpoint.

    Raises:
        ConfigError: for a checkpoint of another model or a damaged one, an `out` that cannot be written, and weights
            that `dtype` cannot hold.
    """
    draft = out.with_name(f".{out.name}.draft")
    try:
        llama = LlamaExport.of(checkpoint, dtype)
        _check_disk(out, llama.bytes)
        verify(checkpoint)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        summary = _write_files(llama, draft)
        for path in (*draft.iterdir(), draft):
            sync(path)
        draft.rename(out)
        sync(out.parent)
        return f"{out}: {summary}"
    except (OSError, SafetensorError) as error:  # the latter where its library cannot write a file
        why = f"cannot be written: {getattr(error, 'strerror', None) or error}"
        raise ConfigError("out", out, why, WRITABLE) from None
    except (BrokenCheckpoint, RankFailed) as error:
        why, legal = f"not complete: {error}", "another one of that run"
        raise ConfigError("checkpoint", checkpoint.folder, why, legal) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@dataclass(frozen=True)
class LlamaExport:
    """A Llama checkpoint to be written as a Hugging Face folder."""

    checkpoint: Checkpoint
    settings: dict[str, Any]
    """Of our model: see `hf.llama`."""
    sizes: dict[str, int]
    """Numbers in each parameter, in the model's order."""
    dtype: torch.dtype
    """In which it is written."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: str | None) -> LlamaExport:
        """What is to be written of a checkpoint.

        Raises:
            ConfigError: if it is not of a Llama.
            BrokenCheckpoint: if it lacks a parameter.
        """
        config = model_config(checkpoint.manifest.experiment["model"])
        saved = tensors_of(checkpoint)
        model = meta_model(config)
        settings = settings_with_defaults(config)
        unknown = [name for name, _ in model.named_parameters() if hugging_face_name(name) is None]
        if unknown or not settings.keys() >= SETTING_NAMES.keys():
            why = f"its model is {config.name}, for which Hugging Face has no class"
            legal = "one of a llama2_* model, or of model=hf; for others docs/python.md has a state dict"
            raise ConfigError("checkpoint", checkpoint.folder, why, legal)
        sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
        if lost := [name for name in sizes if f"{MODEL}{name}" not in saved]:
            raise BrokenCheckpoint(f"it has no {lost[0]}")
        own = saved[f"{MODEL}{next(iter(sizes))}"].properties.dtype
        return cls(checkpoint, settings, sizes, getattr(torch, dtype) if dtype else own)

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values()) * self.dtype.itemsize

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Whole parameters, one at a time."""
        for name, tensor in read_tensors(self.checkpoint.folder, [f"{MODEL}{name}" for name in names]):
            yield name.removeprefix(MODEL), tensor


def _write_files(llama: LlamaExport, draft: Path) -> str:
    """Write weights, tokenizer and, last, config.json; returns a summary in a few words."""
    head_dim = llama.settings["dim"] // llama.settings["n_heads"]
    write_weights(draft, llama.sizes, llama.read, head_dim, llama.dtype)
    kept = run_of(llama.checkpoint.folder) / TOKENIZER_FOLDER
    ids = special_ids(shutil.copytree(kept, draft, dirs_exist_ok=True)) if kept.is_dir() else (None, None)
    write_config(draft, llama.settings, llama.dtype, *ids)
    weights = list(draft.glob("*.safetensors"))
    for path in weights:
        path.chmod((draft / CONFIG).stat().st_mode)  # safetensors writes what its owner alone can read
    dtype, numbers = str(llama.dtype).removeprefix("torch."), sum(llama.sizes.values())
    files = f"{llama.bytes / 1e6:,.1f} MB in {len(weights)} file{'s' * (len(weights) > 1)}"
    tokenizer = "its tokenizer" if kept.is_dir() else "no tokenizer, since the run's data had none"
    return f"step {llama.checkpoint.step}, {numbers:,} parameters in {dtype}, {files}, {tokenizer}"


def _check_disk(out: Path, needed: int) -> None:
    there = next(path for path in out.absolute().parents if path.exists())
    if (free := shutil.disk_usage(there).free) < needed:
        why = f"it takes {needed / 1e6:,.1f} MB, and the disk has {free / 1e6:,.1f} MB left"
        raise ConfigError("out", out, why, "a folder on another disk, or dtype=bfloat16")


def write_weights(
    folder: Path,
    sizes: Mapping[str, int],
    read: ReadParameters,
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
    """Write config.json and generation_config.json: what transformers reads first. See `llama.config_json`."""
    ids = {"bos_token_id": bos, "eos_token_id": eos}
    write_json(folder / "generation_config.json", {"_from_model_config": True, **ids})
    write_json(folder / CONFIG, config_json(settings, str(dtype).removeprefix("torch."), bos, eos))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, int], most: int) -> Iterator[Sequence[str]]:
    """Groups of consecutive parameters with at most this many numbers; a larger parameter is alone."""
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
    if has_rotary_rows(name):
        rows = hugging_face_rows(torch.arange(len(tensor)), head_dim)
        tensor = torch.empty_like(tensor).index_copy_(0, rows, tensor)
    narrow = tensor.to(dtype)
    if not torch.isfinite(narrow).all():
        most = f"{float(tensor.abs().max()):.3g}"
        legal = "bfloat16, which has the range of float32, or the checkpoint's own"
        kind = str(dtype).removeprefix("torch.")
        raise ConfigError("dtype", kind, f"{name} has numbers up to {most}, too large for it", legal)
    return narrow.contiguous()
