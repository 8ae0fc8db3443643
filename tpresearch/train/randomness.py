"""Random operations of a model, such as dropout, seeded by the position in the run."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor import _random as dtensor_random
from torch.overrides import TorchFunctionMode

from tpresearch.config.axes import LAYER_AXES
from tpresearch.config.choices import Checkpointing
from tpresearch.config.errors import ConfigError, WrongModel
from tpresearch.config.schema import ParallelConfig
from tpresearch.parallel.mesh import data_rank
from tpresearch.parallel.weights import seed_of
from tpresearch.plan.compiler import Plan, unit_of
from tpresearch.plan.meta import elements_of
from tpresearch.plan.probe import PYTHON
from tpresearch.train.observe import Observer
from tpresearch.train.state import TrainState


class SeededRandomness(Observer):
    """Seeds the generators of torch, Python and NumPy at each micro-batch by (seed, step, micro-batch, data-parallel rank).

    Ranks that hold the same activation draw the same numbers. A function that is given a shard of what it has in one process
    draws by its rank along the axes that shard layers too; in a compiled model, which no generator can be seeded in, an
    `nn.Dropout` does, from a tensor that it reads.

    Args:
        compiled: whether the plan's blocks are.
    """

    def __init__(self, seed: int, mesh: DeviceMesh, plan: Plan, compiled: bool) -> None:
        self._seed, self._mesh, self._plan, self._compiled = seed, mesh, plan, compiled
        self._replica = data_rank(mesh)
        shard = tuple(mesh.get_local_rank(axis) for axis in LAYER_AXES)
        self._shard, self._draws = shard, DrawsOnShards(plan.probe.draws, shard)
        self._step = self._micro_batch = 0
        self._seed_in_blocks = torch.zeros((), dtype=torch.int64)

    def start(self, state: TrainState) -> None:
        for name, calls in self._plan.probe.draws.items() if self._plan.rules and self._compiled else ():
            module = state.model.get_submodule(name)
            assert isinstance(module, nn.Dropout)  # see `check_randomness`
            (elements,) = calls["dropout"]
            place = f"{name} {self._shard}"
            forward = _dropout_on_shards(module, elements, self._seed_in_blocks, place)
            setattr(module, "forward", forward)  # noqa: B010
        if self._watches:
            self._draws.watch(state.model)
        if self._plan.rules and self._mesh.device_type == "cuda":
            # Else torch would give all ranks the generator of rank 0 at the first draw on a DTensor, which recomputing would
            # not repeat (private; read in torch 2.11 and 2.13).
            dtensor_random.manual_seed(self._seed, self._mesh)

    @property
    def _watches(self) -> bool:
        return bool(self._plan.rules) and not self._compiled

    def step(self, state: TrainState) -> AbstractContextManager[object]:
        self._step, self._micro_batch = state.step, 0
        return nullcontext()

    def phase(self, name: str) -> AbstractContextManager[object]:
        if name == "forward":
            self._micro_batch += 1
            position = (self._seed, self._step, self._micro_batch, self._replica)
            _reseed(*position)
            random.seed(seed_of(f"python {position}"))
            np.random.seed(seed_of(f"numpy {position}") & 0xFFFFFFFF)
            self._seed_in_blocks.fill_(seed_of(f"blocks {position}") >> 1)
            self._draws.begin()
        return self._draws if self._watches and name == "forward" else nullcontext()


def check_randomness(model: nn.Module, plan: Plan, parallel: ParallelConfig) -> None:
    """Refuse to compile a model in which tensor-parallel ranks could not draw apart, and one whose backward would draw anew:
    within a budget torch recomputes random ops as any other (2.11 to 2.14), those of Python and NumPy in any case, and eager
    `rrelu` as far as its noise, still unset (2.13; pytorch issue 193671), and gradients would be wrong.
    """
    kind, key = parallel.activation_checkpointing, "parallel.activation_checkpointing"
    if PYTHON in plan.probe.draws.get("", {}) and kind is not Checkpointing.none:
        why = "the model draws by Python's or NumPy's generator, and what is recomputed would draw anew"
        raise ConfigError(key, kind, why, "none, or draws by torch's", fix={key: "none"})
    for name, calls in plan.probe.draws.items():
        in_block = name in plan.blocks or unit_of(name, plan.blocks) is not None
        is_rrelu = any(function.startswith("rrelu") for function in calls)
        if in_block and is_rrelu and not parallel.compile and kind is not Checkpointing.none:
            why = f"{name} calls rrelu, whose noise autograd keeps before it is drawn: recomputing would end there, without noise"
            raise ConfigError(key, kind, why, "none, or another activation", fix={key: "none"})
        if in_block and parallel.compile and kind is Checkpointing.budget:
            why = f"{name} draws random numbers in a block, and torch would draw others where it recomputes them"
            fix = {"parallel.activation_checkpointing": "selective"}
            legal = "none, selective or full"
            raise ConfigError(key, "budget", why, legal, fix=fix)
        if not (plan.rules and parallel.compile):
            continue
        if type(model.get_submodule(name)) is not nn.Dropout:
            why = f"{name or 'the model'} draws random numbers; compiled, tensor-parallel ranks draw apart only in nn.Dropout"
        elif len(calls["dropout"]) > 1:
            why = f"{name} is called more than once; compiled, tensor-parallel ranks would drop the same each time"
        else:
            continue
        fix, legal = {"parallel.compile": "false"}, "false, or an nn.Dropout for each place"
        raise ConfigError("parallel.compile", True, why, legal, fix=fix)


class DrawsOnShards(TorchFunctionMode):
    """Lets a function draw by the rank's own place while it works on a shard, from what all ranks agreed on before.

    That it is a shard is told by the same call in a forward of the plain model. All else follows from the generator's state,
    which activation checkpointing brings back to compute again, in this mode too.

    Args:
        draws: see `Probe`. place: of this rank, on the axes that shard layers.
    """

    def __init__(self, draws: Mapping[str, Mapping[str, Sequence[int]]], place: tuple[int, ...]) -> None:
        super().__init__()
        self._draws, self._place = draws, place
        self._names = {function for calls in draws.values() for function in calls}
        self._running: list[str] = []
        self._called: Counter[tuple[str, str]] = Counter()
        self._apart: dict[int, bool] = {}

    def watch(self, model: nn.Module) -> None:
        """Follow which module is running."""
        for name, module in model.named_modules():
            module.register_forward_pre_hook(functools.partial(self._enter, name))
            module.register_forward_hook(self._leave)

    def _enter(self, name: str, *_: object) -> None:
        self._running.append(name)

    def _leave(self, *_: object) -> None:
        if self._running:  # recomputing may have been left early, and another forward have begun
            self._running.pop()

    def begin(self) -> None:
        """The forward of a micro-batch begins."""
        self._running.clear()
        self._called.clear()
        self._apart.clear()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in self._names:
            return func(*args, **kwargs)
        agreed = int(torch.randint(1 << 62, ()).item())
        if agreed not in self._apart:  # and is not recomputed
            output = func(*args, **kwargs) if elements_of((args, kwargs), None) is None else None
            self._apart[agreed] = self._is_shard(name, elements_of((args, kwargs), output))
            if output is not None and not self._apart[agreed]:
                return output
        if not self._apart[agreed]:
            return func(*args, **kwargs)
        if kwargs.get("generator") is not None:
            module = self._running[-1] if self._running else ""
            why = f"{name} draws by a generator of its own, with which tensor-parallel ranks would draw alike on their shards"
            raise WrongModel(module or "model", why, "torch's own generator, which each step seeds")
        _reseed(agreed, *self._place)
        output = func(*args, **kwargs)
        _reseed(agreed)
        return output

    def _is_shard(self, function: str, elements: int | None) -> bool:
        module = self._running[-1] if self._running else ""
        whole = self._draws.get(module, {}).get(function)
        place = module, function
        self._called[place] += 1
        return bool(whole) and (elements or 0) < whole[min(self._called[place], len(whole)) - 1]


def _dropout_on_shards(
    module: nn.Dropout, whole: int, seed: Tensor, place: str
) -> Callable[[Tensor], Tensor]:
    """The module's forward for a compiler: on a shard it draws by a seed of its own place, else as before.

    Args:
        whole: elements of its input in one process.
    """
    plain = module.forward

    def forward(x: Tensor) -> Tensor:
        local = x.to_local() if isinstance(x, DTensor) else x
        if not module.training or local.numel() == whole:
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
