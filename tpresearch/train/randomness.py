"""Random operations of a model, such as dropout, seeded by the position in the run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tpresearch.config.axes import LAYER_AXES
from tpresearch.parallel.mesh import data_rank
from tpresearch.parallel.weights import seed_of
from tpresearch.train.observe import Observer
from tpresearch.train.state import TrainState


class SeededRandomness(Observer):
    """Seeds torch's generators at each micro-batch by (seed, step, micro-batch, data-parallel rank).

    Ranks that hold the same activation draw the same numbers. A module that is given a shard of what it has in one
    process draws by its rank along the axes that shard layers too.

    Args:
        modules: those that draw, with the shape of the whole input of each in a micro-batch.
    """

    def __init__(self, seed: int, mesh: DeviceMesh, modules: dict[str, torch.Size]) -> None:
        self._seed, self._modules = seed, modules
        self._replica = data_rank(mesh)
        self._shard = tuple(mesh.get_local_rank(axis) for axis in LAYER_AXES)
        self._step = self._micro_batch = 0

    def start(self, state: TrainState) -> None:
        for name, shape in self._modules.items():
            _RandomOnShards(shape, self._shard).watch(state.model.get_submodule(name))

    def step(self, state: TrainState) -> AbstractContextManager[object]:
        self._step, self._micro_batch = state.step, 0
        return nullcontext()

    def phase(self, name: str) -> AbstractContextManager[object]:
        if name == "forward":
            self._micro_batch += 1
            _reseed(self._seed, self._step, self._micro_batch, self._replica)
        return nullcontext()


class _RandomOnShards:
    """Lets a module draw by the rank's own place while it works on a shard, from what all ranks agreed on before.

    All of it follows from the generator's state, which activation checkpointing brings back to compute again.
    """

    def __init__(self, whole: torch.Size, shard: tuple[int, ...]) -> None:
        self._whole, self._place = whole, shard
        self._agreed: int | None = None

    def watch(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after)

    def _before(self, module: nn.Module, args: tuple[object, ...]) -> None:
        given = next((arg for arg in args if isinstance(arg, Tensor)), None)
        local = given.to_local() if isinstance(given, DTensor) else given
        if module.training and local is not None and local.numel() < self._whole.numel():
            self._agreed = int(torch.randint(1 << 62, ()).item())
            _reseed(self._agreed, *self._place)

    def _after(self, *_: object) -> None:
        if self._agreed is not None:
            _reseed(self._agreed)
            self._agreed = None


def _reseed(*place: int) -> None:
    torch.manual_seed(seed_of(repr(place)))
