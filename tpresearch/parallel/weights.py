"""Initial weights: a function of seed, parameter name and position in the tensor, independent of mesh, device and plan."""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

from tpresearch.config.world import World, usable_cores
from tpresearch.plan.initializers import ElementwiseInitializer, Initializer, ModuleInitializer
from tpresearch.plan.parameters import tie, tied_parameters

WeightSource = Callable[[nn.Module], None]
"""A weight source sets every parameter of a model, sharded or not, in place: each rank sets what it holds."""

TILE, TILE_COLUMNS = 65_536, 512
"""Elements of a tile, and of each of its rows. Larger tiles have a narrow shard draw more beyond its edges; smaller ones
cost more than their numbers do, in Python and at their edges."""


def materialize(
    model: nn.Module,
    device: torch.device,
    source: WeightSource,
    buffers: torch.device | None = None,
    seed: int = 0,
) -> None:
    """Move a model off the meta device and set its initial weights.

    Args:
        device: where parameters go. buffers: where buffers go, if elsewhere: parameters may be offloaded, buffers are not.
        seed: of what buffers draw.
    """
    ties = tied_parameters(model)
    model.to_empty(device=device)
    tie(model, ties)
    if buffers is not None and buffers != device:
        for module in model.modules():
            for key, buffer in module.named_buffers(recurse=False):
                module._buffers[key] = buffer.to(buffers)
    source(model)
    fill_buffers(model, seed)  # `to_empty` left them unset


def fill_buffers(model: nn.Module, seed: int) -> None:
    """Fill buffers that hold computed values. What one draws, such as a random projection, follows from the seed and the name of its
    module: it is the same on all ranks, and where the run resumes."""
    # By the device: in a simulated step, a fake tensor says that it is_cuda.
    cards = {buffer.get_device() for buffer in model.buffers() if buffer.device.type == "cuda"}
    for name, module in model.named_modules():
        if hasattr(module, "reset_buffers"):
            with torch.random.fork_rng([*cards]):
                torch.manual_seed(seed_of(f"{seed} {name}"))
                module.reset_buffers()  # pyrefly: ignore[not-callable]


def from_seed(initializers: Mapping[str, Initializer], seed: int, threads: int | None = None) -> WeightSource:
    """A weight source: weights as the plain model would draw them; each rank draws only the tiles that overlap its shards.

    Args:
        initializers: of each parameter, read from the plain model.
        threads: for drawing; by default the cores per rank of this host.
    """

    @torch.no_grad()
    def source(model: nn.Module) -> None:
        whole = functools.lru_cache(maxsize=1)(ModuleInitializer.draw)
        bands: list[Future[None]] = []
        drawn: set[int] = set()
        cores_per_rank = usable_cores() // World.from_environment().local_size
        with ThreadPoolExecutor(threads or max(1, cores_per_rank)) as pool:
            for prefix, module in model.named_modules():
                for key, parameter in module.named_parameters(recurse=False):
                    if id(parameter) in drawn:  # it is tied to an earlier one
                        continue
                    drawn.add(id(parameter))
                    name = f"{prefix}.{key}" if prefix else key
                    initializer = initializers[name]
                    if isinstance(initializer, ModuleInitializer):
                        set_parameter(parameter, whole(initializer, seed_of(f"{seed}:{prefix}"))[key])
                    else:
                        draw_band = functools.partial(_draw_band, parameter, initializer, f"{seed}:{name}")
                        bands += [pool.submit(draw_band, *band) for band in _tile_bands(parameter)]
            for band in bands:
                band.result()

    return source


@torch.no_grad()
def set_parameter(parameter: Tensor, full: Tensor) -> None:
    """Set a parameter's values from the full tensor; a sharded one takes its part, and nothing is sent."""
    for dim, index in enumerate(held_indices(parameter)):
        if len(index) != full.shape[dim]:
            full = full.index_select(dim, index.to(full.device))
    local_part(parameter).copy_(full)


def held_indices(parameter: Tensor) -> list[Tensor]:
    """Along each dim, the indices into the whole parameter of the elements that this rank holds.

    Raises:
        ValueError: if FSDP over tensor parallelism cuts unevenly, and torch does not say how.
    """
    indices = [torch.arange(size) for size in parameter.shape]
    if isinstance(parameter, DTensor):
        for dim, index in enumerate(indices):
            # Torch splits the indices as it split the parameter, even if shards are uneven or strided.
            cuts = [p if getattr(p, "dim", None) == dim else Replicate() for p in parameter.placements]
            line = index.view([-1 if other == dim else 1 for other in range(parameter.dim())])
            shard = distribute_tensor(line, parameter.device_mesh, cuts, src_data_rank=None)
            indices[dim] = shard.to_local().flatten().cpu()
    lengths, shape = [len(index) for index in indices], list(local_part(parameter).shape)
    if lengths != shape:
        raise ValueError(
            f"a parameter of shape {list(parameter.shape)} has a shard of {shape}, not of {lengths}"
        )
    return indices


def local_part(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter; writing to it sets the parameter."""
    return (parameter.to_local() if isinstance(parameter, DTensor) else parameter).detach()


class TileSlice(NamedTuple):
    """The part of a tile that a rank holds, along one dim."""

    tile_start: int
    """Where the tile begins in the parameter."""
    in_tile: slice
    in_shard: slice


def tile_slices(index: Tensor, side: int) -> list[TileSlice]:
    """The indices that a rank holds along a dim, cut into runs of consecutive ones within a tile."""
    begins = (index[1:] != index[:-1] + 1) | (index[1:] % side == 0)
    bounds = [0, *(begins.nonzero().flatten() + 1).tolist(), len(index)]
    found = []
    for start, stop in itertools.pairwise(bounds):
        if start < stop:
            offset = int(index[start]) % side
            tile_start = int(index[start]) - offset
            found.append(TileSlice(tile_start, slice(offset, offset + stop - start), slice(start, stop)))
    return found


def tile_shape(shape: Sequence[int]) -> list[int]:
    """128 x 512 of a matrix; of anything else as many elements, from the last dim on."""
    left = TILE
    tile: list[int] = []
    for size in reversed(shape):
        widest = left if tile or len(shape) == 1 else TILE_COLUMNS
        tile.insert(0, max(1, min(size, widest)))
        left //= tile[0]
    return tile


def _tile_bands(parameter: Tensor) -> Iterator[tuple[tuple[TileSlice, ...], list[TileSlice]]]:
    """What a rank holds, in bands of tiles side by side: per band, its slices along all dims but the last, and those along the last."""
    sides = tile_shape(parameter.shape)
    *leading, last = (
        tile_slices(index, side) for index, side in zip(held_indices(parameter), sides, strict=True)
    )
    return ((lead, last) for lead in itertools.product(*leading))


@torch.no_grad()
def _draw_band(
    parameter: Tensor,
    initializer: ElementwiseInitializer,
    key: str,
    lead: tuple[TileSlice, ...],
    last: list[TileSlice],
) -> None:
    """Draw the tiles of a band on the CPU, each in full from its own generator, and keep what this rank holds."""
    home = local_part(parameter)[tuple(piece.in_shard for piece in lead)]
    band = home if home.device.type == "cpu" else torch.empty(home.shape, dtype=torch.float32)
    generator, buffer = torch.Generator(), torch.empty(TILE, dtype=torch.float32)
    start = [piece.tile_start for piece in lead]
    sides = tile_shape(parameter.shape)
    rows = [min(side, size - at) for side, size, at in zip(sides, parameter.shape, start, strict=False)]
    in_tile = tuple(piece.in_tile for piece in lead)
    for piece in last:
        columns = min(sides[-1], parameter.shape[-1] - piece.tile_start)
        tile = buffer[: math.prod(rows) * columns].view(*rows, columns)
        generator.manual_seed(seed_of(f"{key}:{[*start, piece.tile_start]}"))
        initializer.draw(tile, [*start, piece.tile_start], generator)
        band[..., piece.in_shard] = tile[(*in_tile, piece.in_tile)]
    if band is not home:
        home.copy_(band)


def seed_of(text: str) -> int:
    """A seed for torch's generator, whose CPU one takes the lower 32 bits of it."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
