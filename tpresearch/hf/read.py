"""A weight source: initial weights from a Hugging Face folder; each rank reads only the bytes that it holds."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor, nn

from tpresearch.checkpoint.collective import on_all_ranks
from tpresearch.config.errors import ConfigError
from tpresearch.config.model import ModelConfig
from tpresearch.hf.files import check_tensors, settings_of, stored_tensors, weights_folder, weights_hash
from tpresearch.hf.llama import check_settings, has_rotary_rows, hugging_face_name, hugging_face_rows
from tpresearch.parallel.weights import WeightSource, held_indices, local_part, tile_slices
from tpresearch.plan.meta import settings_with_defaults
from tpresearch.plan.parameters import tied_parameters


def from_hugging_face(init_from: str, config: ModelConfig) -> WeightSource:
    """The weights of a folder or hub id that `check_weights` has found to be those of this model.

    Files are memory-mapped, and a rank touches only the pages of what it holds: besides its weights it needs room for its
    part of one query or key projection. Nothing is sent, and no random number is drawn.
    """
    settings = settings_with_defaults(config)
    head_dim = settings["dim"] // settings["n_heads"]

    @torch.no_grad()
    def source(model: nn.Module) -> None:
        with _opened(init_from, model) as parts:
            for name, parameter in model.named_parameters():
                _load_parameter(parameter, parts[name], head_dim if has_rotary_rows(name) else None)

    return source


def check_same_weights(init_from: str, group: dist.ProcessGroup | None) -> None:
    """Refuse initial weights that are other ones on some hosts, or of a run there and of a Hugging Face folder here. Collective.

    Raises:
        ConfigError: on every rank.
    """
    mine = weights_hash(init_from)
    first, *others = on_all_ranks(lambda: mine, group)
    if any(other != first for other in others):
        legal = "the same on every host, as on a disk that they share"
        raise ConfigError("init_from", init_from, "on some hosts it holds other weights", legal)


@contextmanager
def _opened(init_from: str, model: nn.Module) -> Iterator[dict[str, Any]]:
    """Each parameter's tensor in its file, as safetensors slices it, by our names."""
    stored = stored_tensors(weights_folder(init_from), init_from)
    with ExitStack() as opened:
        paths = {path for path, *_ in stored.values()}
        handles = {path: opened.enter_context(safe_open(path, "pt")) for path in paths}
        names = {name: hugging_face_name(name) or "" for name, _ in model.named_parameters()}
        yield {name: handles[stored[there][0]].get_slice(there) for name, there in names.items()}


def check_weights(init_from: str, config: ModelConfig, model: nn.Module, download: bool = True) -> None:
    """Refuse a Hugging Face folder whose weights are not those of this model.

    Args:
        config: the model's. model: on the meta device.
        download: whether weights on the hub are downloaded and checked too; otherwise only config.json.

    Raises:
        ConfigError: for settings that differ, and tensors that are missing, superfluous or of another shape.
    """
    check_settings(settings_of(init_from), settings_with_defaults(config), init_from)
    if not download and not Path(os.path.expanduser(init_from)).exists():
        return
    shapes = {}
    for name, parameter in model.named_parameters():
        if (there := hugging_face_name(name)) is None:
            why = f"it holds a Llama, which has no parameter {name}"
            raise ConfigError("init_from", init_from, why, "model=hf, or a llama2_* of the same sizes")
        shapes[there] = parameter.shape
    check_tensors(weights_folder(init_from), init_from, shapes, bool(tied_parameters(model)))


def _load_parameter(parameter: Tensor, part: Any, head_dim: int | None) -> None:
    """Set what this rank holds of a parameter.

    Args:
        part: of the whole tensor in its file, as safetensors slices it. head_dim: where rows are in another order there.
    """
    indices, local = held_indices(parameter), local_part(parameter)
    order = None
    if head_dim:
        rows = hugging_face_rows(indices[0], head_dim)
        order = rows.argsort()
        indices[0] = rows[order]
    runs = [tile_slices(index, size) for index, size in zip(indices, parameter.shape, strict=True)]
    for box in itertools.product(*runs):
        block = part[tuple(run.in_tile for run in box)]
        home: tuple[Any, ...] = tuple(run.in_shard for run in box)
        if order is None:
            local[home].copy_(block)  # from the mapped file to where it stays
        else:
            local[(order[home[0]].to(local.device), *home[1:])] = block.to(local.device, local.dtype)
