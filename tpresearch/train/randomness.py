"""Random operations of a model, such as dropout, seeded by the position in the run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tpresearch.config.axes import LAYER_AXES
from tpresearch.config.choices import Checkpointing
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import ParallelConfig
from tpresearch.parallel.mesh import data_rank
from tpresearch.parallel.weights import seed_of
from tpresearch.plan.compiler import Plan
from tpresearch.train.observe import Observer
from tpresearch.train.state import TrainState


class SeededRandomness(Observer):
    """Seeds torch's generators at each micro-batch by (seed, step, micro-batch, data-parallel rank).

    Ranks that hold the same activation draw the same numbers. A module that is given a shard of what it has in one
    process draws by its rank along the axes that shard layers too; within a compiled block, which no generator can be
    seeded in, from a tensor that the block reads.

    Args:
        compiled: whether the plan's blocks are.
    """

    def __init__(self, seed: int, mesh: DeviceMesh, plan: Plan, compiled: bool) -> None:
        self._seed, self._plan, self._compiled = seed, plan, compiled
        self._replica = data_rank(mesh)
        self._shard = tuple(mesh.get_local_rank(axis) for axis in LAYER_AXES)
        self._step = self._micro_batch = 0
        self._seed_in_blocks = torch.zeros((), dtype=torch.int64)

    def start(self, state: TrainState) -> None:
        inside = _in_blocks(self._plan) if self._compiled and self._plan.rules else []
        for name, shape in self._plan.probe.random_modules.items():
            module = state.model.get_submodule(name)
            if name in inside and isinstance(module, nn.Dropout):
                place = f"{name} {self._shard}"
                setattr(module, "forward", _dropout_on_shards(module, shape, self._seed_in_blocks, place))  # noqa: B010
            else:
                _RandomOnShards(shape, self._shard).watch(module)

    def step(self, state: TrainState) -> AbstractContextManager[object]:
        self._step, self._micro_batch = state.step, 0
        return nullcontext()

    def phase(self, name: str) -> AbstractContextManager[object]:
        if name == "forward":
            self._micro_batch += 1
            position = (self._seed, self._step, self._micro_batch, self._replica)
            _reseed(*position)
            self._seed_in_blocks.fill_(seed_of(f"blocks {position}") >> 1)
        return nullcontext()


def check_randomness(model: nn.Module, plan: Plan, parallel: ParallelConfig) -> None:
    """Refuse to compile a block in which tensor-parallel ranks could not draw apart, or whose backward would draw anew:
    within a budget torch recomputes random ops as any other (2.11 to 2.14), and gradients would be wrong.

    Raises:
        ConfigError: naming the module that draws.
    """
    for name in _in_blocks(plan) if parallel.compile else []:
        if parallel.activation_checkpointing is Checkpointing.budget:
            why = f"{name} draws random numbers in a block, and torch would draw others where it recomputes them"
            fix = {"parallel.activation_checkpointing": "selective"}
            legal = "none, selective or full"
            raise ConfigError("parallel.activation_checkpointing", "budget", why, legal, fix=fix)
        if plan.rules and type(model.get_submodule(name)) is not nn.Dropout:
            why = f"{name} draws random numbers in a block; compiled, tensor-parallel ranks draw apart only in nn.Dropout"
            fix = {"parallel.compile": "false"}
            raise ConfigError("parallel.compile", True, why, "false, or nn.Dropout modules", fix=fix)


def _in_blocks(plan: Plan) -> list[str]:
    """Modules of the plan's blocks that draw random numbers."""
    blocks = tuple(plan.blocks)
    return [
        n for n in plan.probe.random_modules if n in blocks or n.startswith(tuple(f"{b}." for b in blocks))
    ]


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


def _dropout_on_shards(
    module: nn.Dropout, whole: torch.Size, seed: Tensor, place: str
) -> Callable[[Tensor], Tensor]:
    """The module's forward for a compiler: on a shard it draws by a seed of its own place, else as before."""
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        local = x.to_local() if isinstance(x, DTensor) else x
        if not module.training or local.numel() == whole.numel():
            return plain(x)
        keeps = 1 - module.p
        kept = local * kept_elements(local.detach(), keeps, seed, place) / keeps if keeps else local * 0
        return DTensor.from_local(kept, x.device_mesh, x.placements) if isinstance(x, DTensor) else kept

    return forward


@torch.library.custom_op("tpresearch::kept_elements", mutates_args=())
def kept_elements(like: Tensor, share: float, seed: Tensor, place: str) -> Tensor:
    """Elements that dropout keeps, a bool tensor of the same shape. The same arguments give the same elements, also
    where activation checkpointing computes them again.

    Args:
        seed: an int64 scalar on the CPU. place: mixed into the seed.
    """
    generator = torch.Generator(like.device).manual_seed(seed_of(f"{int(seed)} {place}"))
    return like.new_empty(like.shape, dtype=torch.bool).bernoulli_(share, generator=generator)


@kept_elements.register_fake
def _(like: Tensor, share: float, seed: Tensor, place: str) -> Tensor:
    return like.new_empty(like.shape, dtype=torch.bool)


def _reseed(*place: int) -> None:
    torch.manual_seed(seed_of(repr(place)))
