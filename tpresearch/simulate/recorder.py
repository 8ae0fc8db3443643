"""Records every op of a step: an observer with a dispatch mode, and the communication ledger."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from tpresearch.ledger.communication import CommunicationLedger
from tpresearch.parallel.weights import local_part
from tpresearch.simulate.device_memory import DeviceMemory, KeptInput, note_propagation, propagating
from tpresearch.simulate.prices import ADDING_MATMUL, COMPILED_ADAMW, PLAIN_ADAMW
from tpresearch.simulate.trace import Op, Touched

SINGLE_KERNEL_MODULES = (nn.RMSNorm,)
"""Modules that CUDA runs as one kernel each way, and a CPU as many ops."""

_IDLE = """
    empty new_empty empty_strided empty_like new_empty_strided set_ resize_ record_stream promote_types
    _local_scalar_dense is_same_size _unsafe_view unsafe_split unsafe_chunk"""
_NO_KERNEL = frozenset(_IDLE.split())
"""Ops that run nothing on a device, beside those that torch calls views."""
_MAY_COPY = ("to", "contiguous")
"""Ops that torch calls views, and that may copy."""
_GEMMS = {
    "mm": 0,
    "bmm": 0,
    "addmm": 1,
    "addmm_": 1,
    "baddbmm": 1,
    "baddbmm_": 1,
    "_scaled_mm": 0,
    ADDING_MATMUL: 1,
}
"""Op -> position of the first factor among its arguments."""
_CONVOLUTIONS = ("convolution", "convolution_backward")
_BAGS = ("_embedding_bag", "_embedding_bag_forward_only")
_COLLECTIVES = ("c10d", "_c10d_functional")
_NAMESPACES = ("aten", "tpresearch", *_COLLECTIVES, "fsdp")


class Recorder(CommunicationLedger):
    """Records each op while entered, in order, in `micro_batches` and `end`.

    recorder = Recorder(mesh, model, plan.blocks, memory, on_cpu=False)
    with recorder.recording():
        with recorder.phase("forward"):
            ...

    Args:
        blocks: names of the model's blocks, in their order.
        memory: the ledger that is entered outside of this one, and told what to exclude.
        on_cpu: whether the step is that of a CPU, which runs `SINGLE_KERNEL_MODULES` op by op, and holds what these ops make.
    """

    def __init__(
        self, mesh: DeviceMesh, model: nn.Module, blocks: list[str], memory: DeviceMemory, on_cpu: bool
    ) -> None:
        super().__init__(mesh)
        self._model, self._memory = model, memory
        self._single_kernels = () if on_cpu else SINGLE_KERNEL_MODULES
        ends = (blocks[0], blocks[-1]) if len(blocks) > 1 else ()
        self._blocks = [model.get_submodule(name) for name in ends]
        self._last_block_from = self._first_block_to = -1
        """Places in autograd's sequence."""
        self._numbers: WeakKeyDictionary[torch.UntypedStorage, int] = WeakKeyDictionary()
        self._next_number = itertools.count()
        self._spans: list[tuple[int, int]] = []
        """Range of places in autograd's sequence, for each call of a single-kernel module."""
        self._running: int | None = None
        self.micro_batches: list[list[Op]] = []
        self.end: list[Op] = []
        self._ops = self.end
        self._last = ""

    @contextmanager
    def recording(self) -> Iterator[None]:
        hooks = []
        for module in self._model.modules():
            if isinstance(module, self._single_kernels):
                hooks.append(module.register_forward_pre_hook(self._enter))
                hooks.append(module.register_forward_hook(self._leave_module))
        if self._blocks:
            hooks.append(self._blocks[0].register_forward_hook(self._after_first_block))
            hooks.append(self._blocks[-1].register_forward_pre_hook(self._before_last_block))
        try:
            with self, note_propagation():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, *_: Any) -> None:
        self._running = len(self._spans)
        self._spans.append((_sequence(), _sequence()))

    def _leave(self, *outputs: Tensor) -> None:
        assert self._running is not None
        for output in outputs:
            self._memory.include(local_part(output))
        self._spans[self._running] = (self._spans[self._running][0], _sequence())
        self._running = None

    def _leave_module(self, _: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self._leave(output)
        return KeptInput.apply(output, local_part(given[0]))

    def as_one_kernel(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function that runs op by op, of which a compiler makes one kernel: it holds its outputs alone."""

        def run(*given: Any) -> Any:
            self._enter()
            result = function(*given)
            self._leave(*tree_leaves(result))
            return result

        return run

    def _after_first_block(self, *_: Any) -> None:
        if self._phase == "forward":  # not when it is recomputed
            self._first_block_to = _sequence()

    def _before_last_block(self, *_: Any) -> None:
        if self._phase == "forward":
            self._last_block_from = _sequence()

    def _mark_moments(self, place: int) -> None:
        """Begin a moment when backward leaves the last block, and when it reaches the first."""
        if place < self._last_block_from:
            self._last_block_from = -1
            self._memory.begin_moment("")
        if place < self._first_block_to:
            self._first_block_to = -1
            self._memory.begin_moment("backward ends")

    @contextmanager
    def phase(self, phase: str) -> Iterator[None]:
        """A micro-batch is its forward, its loss and one backward; what comes after the last is done once per step."""
        if phase == "forward":
            self.micro_batches.append([])
            self._ops = self.micro_batches[-1]
        elif self._last == "backward":
            self._ops = self.end
        self._last = phase
        with super().phase(phase):
            yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all calls; each would go through all modes
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # a tensor around others, as in float8, whose ops on these come here again
        sent = len(self.events)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._schema.name.split("::")[-1]
        if result is not NotImplemented and _launches(func, name) and not propagating:
            event = self.events[-1] if len(self.events) > sent else None
            self._record(func, name, args, kwargs, result, event)
        return result

    def _record(self, func: Any, name: str, args: Any, kwargs: Any, result: Any, event: Any) -> None:
        made = _plain_tensors(result)
        out = (kwargs or {}).get("out")  # of an op that returns it, which only writes to it
        inputs = {**(kwargs or {}), "out": None} if any(t is out for t in made) else kwargs
        given = _plain_tensors((args, inputs))
        if not given and not made:
            return
        if name == "to" and {t.untyped_storage() for t in made} <= {t.untyped_storage() for t in given}:
            return  # of a tensor that has that dtype and layout already, as DTensor's loss has
        if event is None and func.namespace in _COLLECTIVES and name != "wait_tensor":
            return  # among one rank
        if name == COMPILED_ADAMW and not args[-1]:
            name = PLAIN_ADAMW
        kind, shape = _kind_and_shape(func.namespace, name, args, result)
        element = (given or made)[0].element_size()
        if kind == "gemm":
            factor = args[_GEMMS[name]]
            element = factor.element_size() // _parts(factor)
        if self._running is not None:
            for tensor in made:
                if tensor.shape[-1:] != (1,):  # the scales are kept on CUDA too
                    self._memory.exclude(tensor)
        reads, writes = self._touched(given), self._touched(made)
        if name in _BAGS:  # of the table, a row per index
            table, indices = args[:2]
            reads = ((reads[0][0], indices.numel() * _bytes(table[0])), *reads[1:])
        self._ops.append(Op(self._phase, kind, name, reads, writes, element, shape, event, self._kernel()))

    def _kernel(self) -> int:
        """The module call that this op is a part of, forward by where it runs, backward by the node that calls it."""
        if self._running is not None:
            return self._running
        node = torch._C._current_autograd_node()
        if node is None:
            return -1
        place = node._sequence_nr()
        self._mark_moments(place)
        return next((i for i, (first, end) in enumerate(self._spans) if first <= place < end), -1)

    def _touched(self, tensors: list[Tensor]) -> Touched:
        return tuple((self._number(t), _bytes(t)) for t in tensors)

    def _number(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage not in self._numbers:
            self._numbers[storage] = next(self._next_number)
        return self._numbers[storage]


def _kind_and_shape(
    namespace: str, name: str, args: tuple[Any, ...], result: Any
) -> tuple[str, tuple[int, ...]]:
    """An op's kind and shape, as `Op` has them."""
    if namespace in _COLLECTIVES:
        return "wait" if name == "wait_tensor" else "collective", ()
    if name in _GEMMS:
        return "gemm", _gemm_shape(*args[_GEMMS[name] : _GEMMS[name] + 2])
    if name in _CONVOLUTIONS:
        return "convolution", _convolution_shape(args, result, backward=name != "convolution")
    if "scaled_dot_product" in name:
        return "attention", _attention_shape(args, backward="backward" in name)
    return "optimizer" if name.startswith(("_fused_adam", "adamw_")) else "other", ()


def _launches(func: Any, name: str) -> bool:
    """Whether an op may run anything on a device."""
    is_view = func.is_view and name not in _MAY_COPY
    return func.namespace in _NAMESPACES and name not in _NO_KERNEL and not is_view


def _plain_tensors(values: Any) -> list[Tensor]:
    return [t for t in tree_leaves(values) if isinstance(t, Tensor) and not isinstance(t, DTensor)]


def _bytes(tensor: Tensor) -> int:
    """Bytes of memory traffic for a tensor: an expanded dim counts once, and gaps between the elements of a strided view
    count too, up to the 32 bytes that a device moves at once."""
    element, dims = tensor.element_size(), [*zip(tensor.shape, tensor.stride(), strict=True)]
    count = math.prod(size for size, stride in dims if stride)
    steps = [stride for size, stride in dims if size > 1 and stride]
    return element * count * min(min(steps, default=1), max(1, 32 // element))


def _gemm_shape(first: Tensor, second: Tensor) -> tuple[int, ...]:
    """Of complex factors that of their real and imaginary parts, beside each other."""
    products, parts = first.shape[0] if first.dim() == 3 else 1, _parts(first)
    return products, first.shape[-2], parts * second.shape[-1], parts * first.shape[-1]


def _parts(tensor: Tensor) -> int:
    return 2 if tensor.is_complex() else 1


def _convolution_shape(args: tuple[Any, ...], result: Any, backward: bool) -> tuple[int, ...]:
    """That of the matmul of which it is made, twice if backward takes both gradients."""
    output, given, weight = args[:3] if backward else (result, *args[:2])
    transposed, groups = args[7 if backward else 6], args[9 if backward else 8]
    products = groups * (sum(args[10][:2]) if backward else 1)
    channels, each = weight.shape[0], weight[0].numel()  # each: inputs of an output, or outputs of an input
    if transposed:
        return products, given.numel() // channels, each, channels // groups
    return products, output.numel() // channels, channels // groups, each


def _attention_shape(args: tuple[Any, ...], backward: bool) -> tuple[int, ...]:
    query, key = (args[1], args[2]) if backward else (args[0], args[1])
    rows, heads, length, width = query.shape
    causal = any(arg is True for arg in args)  # the one flag among a kernel's arguments
    return rows, heads, key.shape[1], length, key.shape[2], width, int(backward), int(causal)


def _sequence() -> int:
    """The place in autograd's sequence that the next op gets (private, torch 2.11 to 2.14)."""
    found: int = torch.autograd._get_sequence_nr()
    return found
