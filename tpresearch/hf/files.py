"""A Hugging Face folder, local or on the hub: which file has which tensor, validated before any is read. Or one of our runs instead."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from tpresearch.checkpoint.disk import STEP_FOLDER, step_folders
from tpresearch.checkpoint.resume import find_checkpoint, run_of
from tpresearch.config.errors import ConfigError
from tpresearch.config.model import model_config
from tpresearch.data.hub import download, looks_like_hub_id
from tpresearch.data.tokenizer import TOKENIZER_FOLDER, load_hf
from tpresearch.hf.llama import CONFIG, EMBEDDING, OUTPUT, SETTING_NAMES, folder_error, read_settings

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOAT_DTYPES = ("F64", "F32", "BF16", "F16")
IGNORED_SUFFIX = ".rotary_emb.inv_freq"
"""End of the names of tensors that older versions of transformers saved with the weights, and compute now."""
StoredTensor = tuple[Path, list[int], str]
"""A tensor: its file, its shape, and its dtype as safetensors names it."""
LLAMA_CLASS = "tpresearch.models.llama2.Llama2"


def is_hugging_face(init_from: str) -> bool:
    """Whether this names a folder in Hugging Face's layout, or could name one on the hub."""
    path = Path(os.path.expanduser(init_from))
    if not os.path.lexists(path):
        return looks_like_hub_id(init_from)
    # Not `Path.exists`, which raises where it may not look.
    return any(os.path.exists(path / name) for name in (CONFIG, WEIGHTS, INDEX))


def folder_of(init_from: str, files: Sequence[str] = (CONFIG,)) -> Path:
    """The folder that `init_from` names, with these files in it if it is downloaded from the hub.

    Raises:
        ConfigError: for a path that is not a folder, and a hub id that cannot be downloaded.
    """
    path = Path(os.path.expanduser(init_from))
    if os.path.lexists(path):
        if not os.path.isdir(path):
            raise folder_error(init_from, "not a folder")
        return path
    if not looks_like_hub_id(init_from):
        raise folder_error(init_from, "there is no such folder")
    return download(init_from, files, lambda why: folder_error(init_from, why))


def settings_of(init_from: str | None) -> dict[str, Any]:
    """The settings of our model that implement the config.json of this folder or hub id; or those of the Llama in one of
    our runs or checkpoints.

    Raises:
        ConfigError: if there is none, or it describes what our model does not implement.
    """
    if not init_from:
        why = "model=hf takes its sizes from there"
        legal = "a folder or hub id of a Llama with config.json, or a tpresearch run"
        raise ConfigError("init_from", None, why, legal, fix={"init_from": "VALUE"})
    if not is_own_run(init_from):
        return read_settings(folder_of(init_from), init_from)
    from tpresearch.plan.meta import settings_with_defaults  # late: it imports torch

    model = model_config(find_checkpoint(Path(init_from), "init_from").manifest.experiment["model"])
    if model.target != LLAMA_CLASS:
        why, legal = f"its model is {model.name}, and model=hf is a Llama", f"model={model.name}"
        raise ConfigError("init_from", init_from, why, legal, fix={"model": model.name})
    settings = settings_with_defaults(model)
    return {name: settings[name] for name in SETTING_NAMES}


def tokenizer_of(init_from: str | None) -> str | None:
    """Path of the tokenizer of these weights: in that folder, or where one of our runs keeps it.

    Raises:
        ConfigError: for a run without one, since its data were numbers.
    """
    if not init_from or not is_own_run(init_from):
        return init_from
    folder = run_of(Path(init_from)) / TOKENIZER_FOLDER
    if not folder.is_dir():
        size = find_checkpoint(Path(init_from), "init_from").manifest.experiment["tokenizer"]["vocab_size"]
        fix = {"tokenizer": "bpe", "tokenizer.vocab_size": size}
        why, legal = "it keeps no tokenizer, since its data had no text", "another tokenizer beside model=hf"
        raise ConfigError("init_from", init_from, why, legal, fix=fix)
    return str(folder)


def tokenizer_hash_of(init_from: str) -> str | None:
    """Hash of the tokenizer whose tokens these weights know; None where there is none."""
    if is_own_run(init_from):
        return find_checkpoint(Path(init_from), "init_from").manifest.tokenizer_hash
    with suppress(ConfigError):
        return load_hf(init_from).hash
    return None


def weights_hash(init_from: str) -> str:
    """16 hex digits that tell these weights from others: over the checksums of a run's checkpoint; of a Hugging Face folder or hub id
    over the first row of each tensor, in which two trainings of one model differ.

    Raises:
        ConfigError: if there are none.
    """
    import torch  # late: few ask

    digest = hashlib.blake2b(digest_size=8)
    if is_hugging_face(init_from):
        folder = weights_folder(init_from)
        for name, (path, *_) in sorted(stored_tensors(folder, init_from).items()):
            with safe_open(path, "pt") as file:
                first = file.get_slice(name)[:1].contiguous().view(torch.uint8)
                digest.update(name.encode() + first.numpy().tobytes())
    else:
        files = find_checkpoint(Path(init_from), "init_from").manifest.files
        digest.update(repr(sorted(files.items())).encode())
    return digest.hexdigest()


def weights_folder(init_from: str) -> Path:
    """The folder that `init_from` names, with every file of weights in it; of a hub id, those that its index names are downloaded."""
    folder = folder_of(init_from, (CONFIG, WEIGHTS, INDEX))
    if folder == Path(os.path.expanduser(init_from)) or not (folder / INDEX).exists():
        return folder
    return folder_of(init_from, sorted(set(_index(folder / INDEX, init_from).values())))


def stored_tensors(folder: Path, named: str) -> dict[str, StoredTensor]:
    """Each tensor of a folder, by Hugging Face's names, from the headers of its files.

    Args:
        named: what the user called the folder: a path or a hub id.

    Raises:
        ConfigError: for files that are missing, cannot be read or are not safetensors.
    """
    if not (folder / WEIGHTS).exists() and (folder / INDEX).exists():
        files = _index(folder / INDEX, named)
        there = {file: _header(folder / file, named) for file in sorted(set(files.values()))}
        for name, file in files.items():
            if name not in there[file]:
                raise folder_error(named, f"{INDEX} says that {name} is in {file}, but it is not")
        return {name: there[file][name] for name, file in files.items()}
    if not (folder / WEIGHTS).exists():
        pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        if pickled:
            raise folder_error(named, f"{pickled[0]} is a pickle, which may run code when it is read")
        raise folder_error(named, f"has neither {WEIGHTS} nor {INDEX}")
    return _header(folder / WEIGHTS, named)


def check_tensors(folder: Path, named: str, shapes: Mapping[str, Sequence[int]], tied: bool) -> None:
    """Refuse a folder that does not hold exactly these tensors.

    Args:
        shapes: of each parameter, by Hugging Face's names. tied: whether the output layer has the embedding's weight.

    Raises:
        ConfigError: for the first that is missing, has another shape, is not of floats or is not in the model.
    """
    stored = stored_tensors(folder, named)
    for name, shape in shapes.items():
        if name not in stored:
            raise folder_error(named, f"no file of it has {name}")
        _, found, dtype = stored[name]
        if found != list(shape):
            raise folder_error(named, f"{name} has the shape {found}, and the model's is {list(shape)}")
        if dtype not in FLOAT_DTYPES:
            raise folder_error(named, f"{name} is stored as {dtype}, not as one of {', '.join(FLOAT_DTYPES)}")
    surplus = [name for name in stored if name not in shapes and not name.endswith(IGNORED_SUFFIX)]
    if tied and OUTPUT in surplus:
        surplus.remove(OUTPUT)
        _check_tie(stored, named)
    if surplus:
        raise folder_error(named, f"it has {surplus[0]}, which the model does not")


def _check_tie(stored: Mapping[str, StoredTensor], named: str) -> None:
    """Some folders hold a tied weight under both names; then both must be the same."""
    with safe_open(stored[EMBEDDING][0], "pt") as one, safe_open(stored[OUTPUT][0], "pt") as other:
        if not one.get_tensor(EMBEDDING).equal(other.get_tensor(OUTPUT)):
            raise folder_error(named, f"{CONFIG} ties {OUTPUT} to {EMBEDDING}, but they differ")


def _header(path: Path, named: str) -> dict[str, StoredTensor]:
    try:
        path.open("rb").close()  # whose error says why, where safetensors says that there is no file
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {name: (path, part.get_shape(), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise folder_error(named, f"{path.name} cannot be read: {why}") from None


def _index(path: Path, named: str) -> dict[str, str]:
    """The name of the file that has each tensor, by the index."""
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        outside = next((file for file in files.values() if Path(file).name != file), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise folder_error(named, f"{INDEX} cannot be read: {type(error).__name__}: {error}") from None
    if outside is not None:
        raise folder_error(named, f"{INDEX} names {outside}, which is not a file of this folder")
    return dict(files)


def is_own_run(init_from: str) -> bool:
    """Whether this is one of our checkpoints, or a run that has one, and no folder in Hugging Face's layout."""
    path = Path(os.path.expanduser(init_from))
    if is_hugging_face(init_from) or not os.path.isdir(path):
        return False
    try:
        return bool(STEP_FOLDER.fullmatch(path.resolve().name) or step_folders(path))
    except OSError:  # said by whoever reads it
        return False
