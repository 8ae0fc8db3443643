"""A deep model's step, extrapolated from shallow ones where all blocks do the same, so that each adds the same amount."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpresearch.config.axes import MeshSizes
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Checkpointing, Config
from tpresearch.config.validate import micro_batch_size
from tpresearch.data.batches import meta_batch
from tpresearch.ledger.entries import Entry
from tpresearch.plan.compiler import matching_names
from tpresearch.plan.meta import meta_model, weight_dtype
from tpresearch.plan.probe import probe_model
from tpresearch.simulate.compiled_blocks import Call, CompiledBlock, compiled_block, with_compiled_blocks
from tpresearch.simulate.fake_step import record
from tpresearch.simulate.trace import Trace
from tpresearch.train.speed import flops_per_token

log = logging.getLogger(__name__)

RECORDED_DEPTHS = (2, 3)
"""Each is the first of a pair of depths to extrapolate from; the next one is tried if the first does not hold."""
CHECKED_DEPTH = 4
"""Up to this depth the whole model is recorded."""
TOLERANCE = 0.002
"""Relative difference between an extrapolation and a recording above which the extrapolation does not hold."""

MANY_OPS = 20_000
"""Ops of a recorded forward above which recording takes minutes; 4 blocks of a Llama2 run 400."""

RecordStep = Callable[[Config, MeshSizes, frozenset[Call]], Trace]
CompileBlock = Callable[[Config, MeshSizes], CompiledBlock]


@dataclass
class Recording:
    """A config's step at several depths, each recorded when it is first needed."""

    cfg: Config
    sizes: MeshSizes
    depth: int
    """Blocks of the whole model."""
    setting: str | None
    """The model's setting for the number of blocks; None if only the whole model is recorded."""
    flops_per_token: float
    """Of the whole model, with full attention counted, as in MFU."""
    recorder: RecordStep
    compiler: CompileBlock
    traces: dict[int, Trace] = field(default_factory=dict)

    def trace(self, depth: int) -> Trace:
        if depth not in self.traces:
            bounded = self.cfg.parallel.activation_checkpointing is Checkpointing.budget
            again = self.block.recomputed if bounded else frozenset[Call]()
            self.traces[depth] = self.recorder(self.at(depth), self.sizes, again)
        return self.traces[depth]

    @property
    def deepest(self) -> int:
        """The most blocks of a recording, up to the whole model's: one of few compiled blocks is recorded with one more, too."""
        return max(depth for depth in self.traces if depth <= self.depth)

    @cached_property
    def block(self) -> CompiledBlock:
        """A block as compiled, beside one more."""
        return self.compiler(self.at(2) if self.setting else self.cfg, self.sizes)

    def at(self, depth: int) -> Config:
        """The config with a model of this many blocks."""
        if depth == self.depth:
            return self.cfg
        assert self.setting
        args = {**self.cfg.model.args, self.setting: depth}
        return dataclasses.replace(self.cfg, model=dataclasses.replace(self.cfg.model, args=args))

    @property
    def is_shallow(self) -> bool:
        """Whether the whole model is recorded, since shallow ones would cost as much or cannot be made."""
        return self.setting is None or self.depth <= CHECKED_DEPTH

    def at_full_depth(
        self, value: Callable[[Trace], Mapping[str, float]], check: bool = True
    ) -> dict[str, float]:
        """Quantities of the whole model's step, each a sum over blocks and what is outside of them.

        Not exact in principle where a peak changes its place or what a stream waits for changes with depth: therefore
        the check, after which another pair of depths is tried where a quantity of weight is off by more than `TOLERANCE`
        (a sum over replicas of the output layer's gradient may take as long as two blocks), and then the whole model
        is recorded.
        """
        if self.is_shallow:
            return dict(value(self.trace(self.depth)))
        first, _ = RECORDED_DEPTHS
        if not check:
            return _extrapolate(value(self.trace(first)), value(self.trace(first + 1)), self.depth - first)
        for low in RECORDED_DEPTHS:
            less, more, most = (value(self.trace(low + blocks)) for blocks in range(3))
            if _agree(_extrapolate(less, more, 2), most):
                return _extrapolate(more, most, self.depth - low - 1)
        return dict(value(self.trace(self.depth)))

    def memory(self, check: bool = True) -> dict[str, float]:
        """Bytes by moment and kind of the whole model's step, its blocks compiled where they are."""
        held = self.at_full_depth(lambda trace: trace.memory, check)
        mode = self.cfg.parallel.activation_checkpointing
        if not self.cfg.parallel.compile or not self.setting or mode is Checkpointing.full:
            return held  # of a fully checkpointed block, both save only the input
        rows = micro_batch_size(self.cfg, self.sizes)
        kept = rows * self.block.saved_bytes_per_row
        name = "0 forward/activations"
        two, three = (self.trace(depth).memory[name] for depth in RECORDED_DEPTHS)
        return with_compiled_blocks(held, kept - (three - two), self.depth)

    def entries(self, micro_batches: int) -> list[Entry]:
        """The communication ledger of the whole model's step: exact, since each block sends the same."""
        if self.is_shallow:
            return self.trace(self.depth).entries(micro_batches)
        two, three = (
            {(e.axis, e.phase, e.issuer, e.collective): e for e in self.trace(depth).entries(micro_batches)}
            for depth in RECORDED_DEPTHS
        )
        found = []
        for key, more in three.items():
            less = two.get(key, Entry(*key, 0, 0, 0))
            grown = ((getattr(less, n), getattr(more, n)) for n in ("count", "tensor_bytes", "sent_bytes"))
            found.append(Entry(*key, *(a + (self.depth - 2) * (b - a) for a, b in grown)))
        return found


def recording(cfg: Config, sizes: MeshSizes, recorder: RecordStep = record) -> Recording:
    """The config's step, of which nothing is recorded yet.

    Raises:
        ConfigError: for a model that cannot be made at all, and data that it does not accept.
    """
    model = meta_model(cfg.model, weight_dtype(cfg.train))
    depth, setting = depth_of(cfg, model)
    probe = probe_model(model, _inputs(cfg, micro_batch_size(cfg, sizes)), cfg)
    ops = probe.ops * min(depth, CHECKED_DEPTH) // depth if setting else probe.ops
    if ops > MANY_OPS:
        what = "a forward of %s runs %s ops, recorded one by one, which takes long; less with fewer than data.seq_len=%d"
        log.warning(what, cfg.model.name, f"{ops:,}", cfg.data.seq_len)
    flops = flops_per_token(model, cfg.data.seq_len, causal=False, probe=probe)
    return Recording(cfg, sizes, depth, setting, flops, recorder, compiled_block)


def depth_of(cfg: Config, model: nn.Module) -> tuple[int, str | None]:
    """The number of blocks, and the setting that determines it: one that adds a block when it grows by one.

    None where few of its blocks do not tell of the others, as where every sixth has another attention; and for a shallow model,
    which is recorded whole, unless it is compiled: what a block keeps is told by one block more.
    """
    names = _blocks(cfg.model.blocks, model)
    depth = len(names)
    is_needed = depth > CHECKED_DEPTH or cfg.parallel.compile
    if not (is_needed and names and _are_alike(model, names, cfg)):
        return depth, None
    for name, value in cfg.model.args.items():
        if isinstance(value, int) and not isinstance(value, bool) and value == depth:
            found = []
            for other in RECORDED_DEPTHS:
                smaller = dataclasses.replace(cfg.model, args={**cfg.model.args, name: other})
                try:
                    found.append(len(_blocks(cfg.model.blocks, meta_model(smaller))) == other)
                except ConfigError:
                    found.append(False)
            if all(found):
                return depth, name
    return depth, None


def _blocks(patterns: list[str], model: nn.Module) -> list[str]:
    names = [name for name, _ in model.named_modules()]
    found = {name for pattern in patterns for name in matching_names(pattern, names)}
    return [name for name in names if name in found]


class _BlockOps(TorchDispatchMode):
    """Notes the ops that each block runs, and the tensors that they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: dict[str, list[object]] = {}
        self._running = ""

    def enter(self, name: str, *_: object) -> None:
        self._running = name

    def leave(self, *_: object) -> None:
        self._running = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        tensors = [(leaf.shape, leaf.dtype, leaf.requires_grad) for leaf in leaves]
        self.ops.setdefault(self._running, []).append((func, tensors))
        return func(*args, **(kwargs or {}))


def _are_alike(model: nn.Module, blocks: list[str], cfg: Config) -> bool:
    """Whether all blocks of a meta model run the same ops, but for the first, which shallow models have too. False where the meta
    device does not tell."""
    mode = _BlockOps()
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(partial(mode.enter, name)) for name in blocks
    ]
    hooks += [model.get_submodule(name).register_forward_hook(mode.leave) for name in blocks]
    try:
        with mode:
            model(_inputs(cfg, 1))
    except Exception:
        return False
    finally:
        for hook in hooks:
            hook.remove()
    _, *others = (mode.ops.get(name) for name in blocks)
    return all(ops == others[0] for ops in others)


def _inputs(cfg: Config, rows: int) -> Tensor:
    return meta_batch(cfg.data, rows).to(torch.device("meta"), weight_dtype(cfg.train)).inputs


def _extrapolate(less: Mapping[str, float], more: Mapping[str, float], blocks: int) -> dict[str, float]:
    """Quantities of a model with this many blocks more than the first; the second has one more."""
    found = {}
    for name in {**less, **more}:
        low, high = less.get(name, 0.0), more.get(name, 0.0)
        found[name] = low + blocks * (high - low)
    return found


def _agree(told: Mapping[str, float], recorded: Mapping[str, float]) -> bool:
    greatest = max(map(abs, recorded.values()), default=0.0)
    return all(abs(told.get(name, 0.0) - value) <= TOLERANCE * greatest for name, value in recorded.items())
