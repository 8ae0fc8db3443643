"""Loading a checkpoint: verified, then read into the current model; each rank reads what it holds.

A checkpoint is DCP's files and checkpoint.json. DCP's `.metadata` is a pickle; it is read by an unpickler that creates
only descriptions of tensors, so that a checkpoint from elsewhere cannot run code.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from tpresearch.checkpoint.collective import RankFailed, checkpoint_group, dcp_arguments, on_all_ranks
from tpresearch.checkpoint.disk import BrokenCheckpoint, Checkpoint, find_damage, read_checkpoint
from tpresearch.checkpoint.faults import fault_point
from tpresearch.checkpoint.resume import find_checkpoint, run_of, unusable_error
from tpresearch.checkpoint.state import MODEL, CheckpointedState, make_destination, model_state
from tpresearch.config.errors import ConfigError

log = logging.getLogger(__name__)

ALLOWED_GLOBALS = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata"),
        *("TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},
    "collections": {"OrderedDict"},
}
"""Globals that a `.metadata` may refer to, by module; nothing is reached through them, such as modules that they import. The same in torch 2.11 to 2.14."""


def load(checkpoint: Checkpoint, into: CheckpointedState, group: dist.ProcessGroup | None) -> None:
    """Verify a checkpoint, then read what each rank holds. Collective.

    Raises:
        RankFailed: if it is damaged or of another model; `into` may then be partly overwritten.
    """
    verify(checkpoint, group)
    fault_point("verified")
    destination: dict[str, Tensor] = {}
    with into.weights() as weights:

        def prepare() -> None:
            saved = tensors_of(checkpoint)
            destination.update(make_destination(into, weights, saved))
            check_tensors_match(saved, destination)

        on_all_ranks(prepare, group)
        _read(checkpoint.folder, destination, group)
    into.step = checkpoint.step
    fault_point("loaded")


def restore(
    checkpoints: list[Checkpoint], trained: CheckpointedState, group: dist.ProcessGroup | None
) -> None:
    """Load the first of these that can be loaded. Collective.

    Raises:
        ConfigError: if none can.
    """
    last = ""
    for checkpoint in checkpoints:
        try:
            return load(checkpoint, trained, group)
        except RankFailed as error:
            last = str(error)
            log.warning("%s cannot be loaded: %s", checkpoint.folder, last)
    folder = checkpoints[-1].folder
    why = f"none of its {len(checkpoints)} complete checkpoints can be loaded; {folder.name}: {last}"
    raise unusable_error("resume", run_of(folder), why)


def from_checkpoint(init_from: str) -> Callable[[nn.Module], None]:
    """A weight source: initial weights from a checkpoint; each rank reads what it holds, and nothing is drawn.

    Raises:
        ConfigError: if there is none; on every rank, when the source is called, if it is damaged.
    """
    checkpoint = find_checkpoint(Path(init_from), "init_from")

    def source(model: nn.Module) -> None:
        group = checkpoint_group()
        tensors = model_state(model, dict(model.named_parameters()))
        destination = {name: tensor.detach() for name, tensor in tensors.items()}
        try:
            verify(checkpoint, group)
            _read(checkpoint.folder, destination, group)
        except RankFailed as error:
            why = f"{checkpoint.folder.name} cannot be read: {error}"
            raise ConfigError("init_from", init_from, why, "another checkpoint") from None

    return source


def check_initial_weights(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Compare the names and shapes of a model's weights, on any device, with those of a checkpoint.

    Raises:
        BrokenCheckpoint: naming the first that differs.
    """
    saved = {name: about for name, about in tensors_of(checkpoint).items() if name.startswith(MODEL)}
    check_tensors_match(saved, model_state(model, dict(model.named_parameters())), any_float=True)


def read_tensors(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors of a checkpoint by name (`model.tok_embeddings.weight`), one at a time. Without ranks.

    Raises:
        BrokenCheckpoint: if one is not in it, or cannot be read.
    """
    saved = tensors_of(read_checkpoint(folder))
    for name in names:
        if name not in saved:
            raise BrokenCheckpoint(f"it does not contain {name}")
        tensor = torch.empty(saved[name].size, dtype=saved[name].properties.dtype)
        try:
            _read(folder, {name: tensor}, None)
        except RankFailed as error:
            raise BrokenCheckpoint(str(error)) from None
        yield name, tensor


def verify(checkpoint: Checkpoint, group: dist.ProcessGroup | None = None) -> None:
    """Verify the checksum of every file, each on one rank. Collective.

    Raises:
        RankFailed: for the first file that has changed.
    """
    rank, size = (group.rank(), group.size()) if group else (0, 1)
    files = sorted(checkpoint.manifest.files.items(), key=lambda file: -file[1].bytes)

    def read() -> None:
        if wrong := find_damage(checkpoint.folder, files[rank::size]):
            raise BrokenCheckpoint(wrong)

    on_all_ranks(read, group)


def tensors_of(checkpoint: Checkpoint) -> dict[str, TensorStorageMetadata]:
    """Size and dtype of every tensor in it, by name.

    Raises:
        BrokenCheckpoint: if `.metadata` is damaged, or contains anything else.
    """
    # Unpickling what is damaged raises a dozen kinds of errors.
    sealed = [file for file in checkpoint.manifest.files.items() if file[0] == ".metadata"]
    if wrong := find_damage(checkpoint.folder, sealed):
        raise BrokenCheckpoint(wrong)
    metadata = _Reader(checkpoint.folder).read_metadata()
    files = {stored.relative_path for stored in metadata.storage_data.values()}
    if unknown := files - checkpoint.manifest.files.keys():
        raise BrokenCheckpoint(f".metadata names {min(unknown)}, which is not a file of this checkpoint")
    found = metadata.state_dict_metadata
    return {name: about for name, about in found.items() if isinstance(about, TensorStorageMetadata)}


def check_tensors_match(
    saved: Mapping[str, TensorStorageMetadata], destination: Mapping[str, Tensor], any_float: bool = False
) -> None:
    """Refuse a checkpoint whose tensors differ: DCP ignores tensors that only the checkpoint has, and silently casts dtypes.

    Raises:
        BrokenCheckpoint: naming the first tensor that differs.
    """
    if only := saved.keys() ^ destination.keys():
        name = min(only)
        raise BrokenCheckpoint(f"{name} is in {'it' if name in saved else 'this model'} alone")
    for name, tensor in destination.items():
        if saved[name].size != tensor.shape:
            raise BrokenCheckpoint(f"{name} is {list(saved[name].size)} in it and {list(tensor.shape)} here")
        there, here = saved[name].properties.dtype, tensor.dtype
        if there != here and not (any_float and there.is_floating_point and here.is_floating_point):
            raise BrokenCheckpoint(f"{name} is {there} in it and {here} here")


def _read(folder: Path, destination: dict[str, Tensor], group: dist.ProcessGroup | None) -> None:
    with dcp_arguments(group) as how:
        dcp.load(destination, storage_reader=_Reader(folder), **how)


class _Reader(dcp.FileSystemReader):
    """DCP's reader, with a restricted unpickler. Checked on torch 2.13 and 2.14."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            found = _MetadataUnpickler(file).load()
        if not isinstance(found, Metadata):
            raise BrokenCheckpoint(".metadata describes no tensors")
        if found.storage_meta is None:
            found.storage_meta = StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


def _enum_member(kind: Any, name: str) -> Enum:
    """An enum's member, as Python 3.11.0 to 3.11.3 pickle it: by getattr, which would run code on anything else."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise _foreign(f"builtins.getattr of {name}")
    return kind[name]


def _foreign(what: str) -> BrokenCheckpoint:
    return BrokenCheckpoint(f".metadata has {what} in it, which is nothing of a tensor's")


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if name not in ALLOWED_GLOBALS.get(module, ()):
            raise _foreign(f"{module}.{name}")
        return super().find_class(module, name)
