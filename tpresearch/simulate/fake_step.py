"""One step of the real code as rank 0 of any number of ranks, with nothing computed, held or sent."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    UnsupportedFakeTensorException,
)

from tpresearch.config.axes import REPLICATE, MeshSizes
from tpresearch.config.choices import Checkpointing, OnNonfinite
from tpresearch.config.errors import WrongModel
from tpresearch.config.schema import Config
from tpresearch.config.validate import micro_batch_size, micro_batches
from tpresearch.data.batches import Batch, meta_batch
from tpresearch.parallel import reducer
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.device import FAKE
from tpresearch.parallel.float8 import to_float8
from tpresearch.parallel.weights import materialize
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.simulate.compiled_blocks import Call, recompute
from tpresearch.simulate.device_memory import DeviceMemory, by_moment
from tpresearch.simulate.fake_ranks import fake_mesh
from tpresearch.simulate.recorder import Recorder
from tpresearch.simulate.remembered_shapes import RememberingFakeTensorMode
from tpresearch.simulate.trace import Trace
from tpresearch.train import cross_entropy
from tpresearch.train.assemble import build_state
from tpresearch.train.losses import build_objective
from tpresearch.train.observe import Observer, Observers
from tpresearch.train.preflight import plan_model
from tpresearch.train.shapes import refusing_shapes
from tpresearch.train.state import TrainState
from tpresearch.train.step import Setup, train_step

NUMPY = ".numpy()"
"""How torch's error of that method on a fake tensor begins; it has no class of its own."""


class RecordingObserver(Observer):
    """Runs one step under a recorder and the memory ledger."""

    def __init__(self, recorder: Recorder, memory: DeviceMemory) -> None:
        self._recorder, self._memory = recorder, memory

    @contextmanager
    def step(self, state: TrainState) -> Iterator[None]:
        with self._memory, self._recorder.recording():
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self._recorder.phase(name), self._memory.phase(name):
            yield

    def gradients(self, state: TrainState) -> None:
        self._memory.note_gradients()


def record(cfg: Config, sizes: MeshSizes, recomputed: frozenset[Call] = frozenset()) -> Trace:
    """Record a step of rank 0 that is not its first, with as many micro-batches as determine all others.

    Args:
        recomputed: with activation_checkpointing=budget, what its compiled blocks compute again.

    Raises:
        ConfigError: for a model whose ops depend on the values of data.
    """
    try:
        return _record(cfg, sizes, recomputed)
    except UnsupportedFakeTensorException as error:
        raise WrongModel(
            cfg.model.name, f"it cannot run on shapes alone: {error}", "ops with a meta kernel"
        ) from error
    except RuntimeError as error:
        is_numpy = str(error).startswith(NUMPY)
        if not (is_numpy or isinstance(error, DataDependentOutputException | DynamicOutputShapeException)):
            raise
        op = NUMPY if is_numpy else getattr(error, "func", error)
        why = f"{op} depends on the values of data, and a simulated step has none"
        legal = "a forward whose ops follow from shapes alone, without .item(), nonzero or a branch on values"
        raise WrongModel(cfg.model.name, why, legal) from error


def _record(cfg: Config, sizes: MeshSizes, recomputed: frozenset[Call]) -> Trace:
    compiled, on_cpu = cfg.parallel, not cfg.cluster or parse_cluster(cfg.cluster).is_cpu
    # Code that runs other ops on a GPU asks its tensors.
    on_device = nullcontext() if on_cpu else patch.object(FakeTensor, "is_cuda", True)
    cfg, count = recorded_config(cfg, sizes)
    model, plan = plan_model(cfg, sizes)
    to_float8(model, plan.float8, cfg.train)
    with fake_mesh(sizes) as mesh:
        model = parallelize(model, plan, cfg.parallel, mesh, cfg.train.dtype)
        if cfg.parallel.activation_checkpointing is Checkpointing.budget:
            for name in plan.blocks:
                block = model.get_submodule(name)
                block.forward = recompute(block.forward, recomputed)
        with RememberingFakeTensorMode(allow_non_fake_inputs=True), on_device, warnings.catch_warnings():
            # Of fake tensors alone: a linear layer's output is a view there.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module", UserWarning)
            materialize(model, FAKE.torch, lambda _: None)
            state = build_state(model, cfg, plan, mesh)
            objective = build_objective(dataclasses.replace(cfg, parallel=compiled), plan)
            _initialize_optimizer_state(state)
            memory = DeviceMemory(model, state.optimizer, state.remainders)
            recorder = Recorder(mesh, model, plan.blocks, memory, on_cpu)
            observers = Observers([RecordingObserver(recorder, memory)])
            setup = Setup(cfg, plan, mesh, FAKE, objective, observers)
            fused = patch.object(cross_entropy, "_fused", recorder.as_one_kernel)
            # What has no gradient on rank 0 has none on any other rank: that would depend on the rows.
            own_gradients = patch.object(reducer, "is_no_gradient", lambda _: True)
            with fused, own_gradients, refusing_shapes(cfg.model.name, plan):
                train_step(state, _batch(cfg, micro_batch_size(cfg, sizes) * count, setup), setup)
    parts = tuple(tuple(part) for part in recorder.micro_batches)
    changes = memory.changes()
    return Trace(parts, tuple(recorder.end), by_moment(changes), changes)


def _initialize_optimizer_state(state: TrainState) -> None:
    """Create the optimizer's state, as its first step does."""
    trained = [p for p in state.trained_parameters().values() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    state.optimizer.step()
    for parameter in trained:
        parameter.grad = None


def recorded_config(cfg: Config, sizes: MeshSizes) -> tuple[Config, int]:
    """The config to record, and its number of micro-batches.

    Two determine all: the first sets gradients, the second adds to them. Replicas are summed after the last one only, so
    that with them one in between is needed. Compiled code is not recorded: fusion is a matter of prices.
    """
    count = min(micro_batches(cfg, sizes), 3 if sizes[REPLICATE.name] > 1 else 2)
    parallel = dataclasses.replace(cfg.parallel, compile=False, async_tp=False)
    train = dataclasses.replace(cfg.train, micro_batch_size=micro_batch_size(cfg, sizes))
    train.global_batch_size = count * micro_batch_size(cfg, sizes) * sizes.dp
    train.on_nonfinite = OnNonfinite.stop
    return dataclasses.replace(cfg, parallel=parallel, train=train), count


def _batch(cfg: Config, rows: int, setup: Setup) -> Batch:
    shapes = meta_batch(cfg.data, rows)
    return Batch(*(torch.empty_like(t, device=FAKE.torch) for t in shapes)).to(FAKE.torch, setup.input_dtype)
