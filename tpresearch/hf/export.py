"""A checkpoint of ours as a Hugging Face folder: without ranks, and without a whole model in one place."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from tpresearch.checkpoint.disk import BrokenCheckpoint, Checkpoint, sync
from tpresearch.checkpoint.load import read_tensors, tensors_of, verify
from tpresearch.checkpoint.resume import run_of
from tpresearch.checkpoint.state import MODEL
from tpresearch.checkpoint.together import RankFailed
from tpresearch.config.compose import model_config
from tpresearch.config.errors import ConfigError
from tpresearch.data.tokenizer import TOKENIZER_FOLDER, special_ids
from tpresearch.hf.names import hugging_face_name
from tpresearch.hf.settings import CONFIG, NAMES
from tpresearch.hf.write import write_config, write_weights
from tpresearch.plan.meta import all_settings, meta_model


def export(checkpoint: Checkpoint, out: Path, dtype: str | None = None) -> str:
    """Write a checkpoint as a Hugging Face folder, which is there whole or not at all; says what was written.

    Args:
        out: a folder that is not there. dtype: of torch's, for the weights; None for that of the checkpoint.

    Raises:
        ConfigError: for a checkpoint of another model or that is damaged, an `out` that cannot be written, and weights
            that `dtype` cannot hold.
    """
    draft = out.with_name(f".{out.name}.draft")
    try:
        llama = Llama.of(checkpoint, dtype)
        _check_disk(out, llama.bytes)
        verify(checkpoint)
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        said = _write(llama, draft)
        for path in (*draft.iterdir(), draft):
            sync(path)
        draft.rename(out)
        sync(out.parent)
        return f"{out}: {said}"
    except (OSError, SafetensorError) as error:  # the latter where its library cannot write a file
        why = f"cannot be written: {getattr(error, 'strerror', None) or error}"
        raise ConfigError(
            "out", out, why, "a folder that this user can write, with room on its disk"
        ) from None
    except (BrokenCheckpoint, RankFailed) as error:
        raise ConfigError(
            "checkpoint", checkpoint.folder, f"not whole: {error}", "another one of that run"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)


@dataclass(frozen=True)
class Llama:
    """What a checkpoint has to be written."""

    checkpoint: Checkpoint
    settings: dict[str, Any]
    """Of our model: see `hf.settings`."""
    sizes: dict[str, int]
    """Numbers in each parameter, in the model's order."""
    dtype: torch.dtype
    """In which it is written."""

    @classmethod
    def of(cls, checkpoint: Checkpoint, dtype: str | None) -> Llama:
        """Raises:
        ConfigError: where the checkpoint is not of a Llama.
        """
        config = model_config(checkpoint.mark.experiment["model"])
        saved = tensors_of(checkpoint)
        model = meta_model(config)
        settings = all_settings(config)
        strange = [name for name, _ in model.named_parameters() if hugging_face_name(name) is None]
        if strange or not settings.keys() >= NAMES.keys():
            why = f"its model is {config.name}, for which Hugging Face has no class"
            raise ConfigError("checkpoint", checkpoint.folder, why, "one of a llama2_* model, or of model=hf")
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


def _write(llama: Llama, draft: Path) -> str:
    """Weights, tokenizer and, last, config.json; in a few words what they are."""
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
