"""Real training steps of two ranks on a CPU, timed by op and as a whole, in processor time of a rank's main thread."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any, NamedTuple

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tpresearch.api import load
from tpresearch.config.world import World
from tpresearch.data.pipeline import prepare
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.simulate.device_memory import DeviceMemory
from tpresearch.simulate.recorder import Recorder
from tpresearch.simulate.trace import Op
from tpresearch.train.assemble import assemble
from tpresearch.train.observe import Observer
from tpresearch.train.preflight import preflight
from tpresearch.train.state import TrainState

COMMON = ("data=random_tokens", "logger=none", "train.eval_rows=0")
LLAMA = (
    "model=llama2_debug",
    "model.dim=512",
    "model.n_heads=8",
    "model.n_kv_heads=8",
    "model.ffn_dim=1408",
    "model.n_layers=3",
    "tokenizer.vocab_size=4096",
)
"""14 M parameters: as wide as models that are trained on a CPU, and more than its caches hold."""
FULL = ("data.seq_len=256", "train.global_batch_size=4")
"""A step of a second, with caches as cold as in training."""
TINY = (
    "data.seq_len=8",
    "train.global_batch_size=2",
    "model.dim=64",
    "model.ffn_dim=64",
    "tokenizer.vocab_size=260",
)
"""A step whose ops do almost nothing."""
WARM_UP, STEPS = 3, 8


class OpClock(TorchDispatchMode):
    """Times the last op. Entered outside of the mode that records it, so that it times nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # its local ops come here again
        before = time.thread_time()
        result = func(*args, **(kwargs or {}))
        self.seconds = time.thread_time() - before
        return result


class TimedRecorder(Recorder):
    """Records with each op how long it took."""

    def __init__(self, mesh: DeviceMesh, state: TrainState, blocks: list[str], clock: OpClock) -> None:
        memory = DeviceMemory(state.model, state.optimizer, state.remainders)
        super().__init__(mesh, state.model, blocks, memory, on_cpu=True)
        self._clock = clock
        self.timed: list[tuple[Op, float]] = []

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, event: Any) -> None:
        before = len(self._ops)
        super()._record(func, name, args, kwargs, result, event)
        if len(self._ops) > before:
            self.timed.append((self._ops[-1], self._clock.seconds))


class TimedSteps(Observer):
    """The ops of each step that was taken, with their times."""

    def __init__(self, mesh: DeviceMesh, blocks: list[str]) -> None:
        self._mesh, self._blocks = mesh, blocks
        self._clock = OpClock()
        self.enabled = False
        self.taken: list[list[tuple[Op, float]]] = []

    def start(self, state: TrainState) -> None:
        self._recorder = TimedRecorder(self._mesh, state, self._blocks, self._clock)

    @contextmanager
    def step(self, state: TrainState) -> Iterator[None]:
        if not self.enabled:
            yield
            return
        self._recorder.timed = []
        with self._clock, self._recorder.recording():
            yield
        self.taken.append(self._recorder.timed)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        with self._recorder.phase(name):
            yield


class StepTimes(NamedTuple):
    """Steps of `LLAMA` on this rank, alternately with and without timing their ops."""

    ops: list[tuple[Op, float]]
    """Each with its minimum time; for a collective, that of starting it."""
    step_s: float
    """Processor time of a step whose ops are not timed: a median."""
    wall_s: float
    """Wall time of such a step."""
    ops_s: float
    """Total time of the ops of a step: a median."""

    @property
    def host_s(self) -> float:
        """Time outside of ops: Python, autograd and dispatch."""
        return max(0.0, self.step_s - self.ops_s)

    def count(self, issuer: str) -> int:
        """Collectives by one issuer."""
        return sum(op.event is not None and op.event.issuer == issuer for op, _ in self.ops)


def time_steps(world: World, plan: str, tokens: tuple[str, ...]) -> StepTimes:
    """Train `LLAMA` under a plan for some steps, as one rank of a job on gloo.

    Args:
        tokens: overrides that set the size of a step: `FULL` or `TINY`.
    """
    torch.set_num_threads(1)
    cfg = load(*LLAMA, *COMMON, *tokens, f"parallel={plan}")
    job = preflight(cfg, world)
    assert job.device
    found, walls = [], []
    with process_group(job.device, world):
        mesh = build_mesh(job.sizes, "cpu")
        watching = TimedSteps(mesh, job.plan.blocks)
        loop = assemble(job, mesh, job.device, prepare(cfg.data, cfg.tokenizer), [watching])
        for watching.enabled in [False] * WARM_UP + [False, True] * STEPS:
            before, wall = time.thread_time(), time.perf_counter()
            loop.step()
            found.append(time.thread_time() - before)
            walls.append(time.perf_counter() - wall)
    ops = [(same[0][0], min(seconds for _, seconds in same)) for same in zip(*watching.taken, strict=True)]
    in_ops = median(sum(seconds for _, seconds in step) for step in watching.taken)
    return StepTimes(ops, median(found[WARM_UP::2]), median(walls[WARM_UP::2]), in_ops)
