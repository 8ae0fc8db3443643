"""Each parameter's initializer, read from the plain model: what its module's `reset_parameters` does to it.

It is read before tensor parallelism, FSDP or a low-precision layer can replace a module's class, so that none of them
changes the initial weights. Nothing is allocated for it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpresearch.config.errors import WrongModel

RANDOM_METHODS = {"normal_", "uniform_", "exponential_", "log_normal_", "cauchy_"}
SETTING_METHODS = RANDOM_METHODS | {"fill_", "zero_"}
"""In-place methods that set each element regardless of its old value."""
CHANGING_METHODS = {
    *("clamp_", "add_", "sub_", "mul_", "div_", "pow_"),
    *("abs_", "neg_", "exp_", "log_", "erfinv_"),
}
"""In-place methods that change each element independently."""


OF_MODULE = ("_parameters", "_buffers", "_modules")
"""What every `nn.Module` has."""


class Call(NamedTuple):
    """An in-place method called on a parameter, or on a box of it as in `weight[padding_idx].fill_(0)`."""

    method: str
    args: tuple[float | None, ...]
    box: tuple[slice, ...] | None = None


@dataclass(frozen=True)
class ElementwiseInitializer:
    """An initializer with independent elements: any tile of the parameter can be drawn alone."""

    calls: tuple[Call, ...]

    def draw(self, tile: Tensor, start: Sequence[int], generator: torch.Generator) -> None:
        """Draw, in place, the tile whose first element is at `start` in the parameter."""
        for method, args, box in self.calls:
            part = tile if box is None else tile[_overlap(box, start)]
            random = {"generator": generator} if method in RANDOM_METHODS else {}
            getattr(part, method)(*args, **random)


@dataclass(frozen=True, eq=False)
class ModuleInitializer:
    """The initializer of all parameters of a module with any other `reset_parameters`: drawn in full, together."""

    module: nn.Module

    def draw(self, seed: int) -> dict[str, Tensor]:
        """Each of the module's parameters by its key, float32 on the CPU. Torch's default generator stays as it was."""
        module = _stand_in(self.module, lambda p: torch.full(p.shape, torch.nan, dtype=torch.float32))
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            module.reset_parameters()  # pyrefly: ignore[not-callable]
        return {key: parameter.detach() for key, parameter in module.named_parameters(recurse=False)}


Initializer = ElementwiseInitializer | ModuleInitializer


def read_initializers(model: nn.Module) -> dict[str, Initializer]:
    """The initializer of each parameter of a plain model, by FQN. The model may be on the meta device.

    Raises:
        ConfigError: for a module with parameters and no `reset_parameters`, or whose own leaves one of them unset; for
            one with buffers, or tensors that are neither, and no `reset_buffers`.
    """
    for prefix, module in model.named_modules():
        if hasattr(module, "reset_buffers"):
            continue
        name = _describe_module(prefix, module)
        if any(True for _ in module.buffers(recurse=False)):
            raise WrongModel(name, "it has buffers and no reset_buffers", "write one that fills them")
        plain = (key for key, value in vars(module).items() if key not in OF_MODULE and _has_plain(value))
        if key := next(plain, None):
            what = "its tensor" if isinstance(vars(module)[key], Tensor) else "a tensor in its"
            why = f"{what} {key} is neither a parameter nor a buffer, so nothing gives it values"
            raise WrongModel(name, why, "register_buffer, and a reset_buffers that fills it")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return {
        f"{prefix}.{key}" if prefix else key: initializer
        for prefix, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
        for key, initializer in _read_module(module, prefix, mode).items()
    }


def _has_plain(value: object) -> bool:
    """Whether it is a tensor without values that is no parameter, or holds one."""
    if not isinstance(value, Tensor | list | tuple | dict):
        return False
    tensors = (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
    return any(tensor.is_meta and not isinstance(tensor, nn.Parameter) for tensor in tensors)


def _read_module(module: nn.Module, prefix: str, mode: FakeTensorMode) -> dict[str, Initializer]:
    name = _describe_module(prefix, module)
    if not hasattr(module, "reset_parameters"):
        why, legal = "it has parameters and no reset_parameters", "write one that sets each of them"
        if isinstance(module, nn.MultiheadAttention):
            legal = "Linear layers and scaled_dot_product_attention, as Attention in tpresearch.models.llama2"
        raise WrongModel(name, why, legal)
    with mode:  # not on the meta device, for which torch.nn.init leaves out some of its calls
        stand_in = _stand_in(module, lambda p: torch.empty(p.shape, dtype=torch.float32))
    recorder = _Recorder(stand_in)
    try:
        with mode, recorder:
            stand_in.reset_parameters()  # pyrefly: ignore[not-callable]
    except Exception:  # it reads values, and there are none; its own errors surface in ModuleInitializer.draw
        recorder.elementwise = False
    if not recorder.elementwise or recorder.storages != _storages(stand_in):
        return dict.fromkeys(recorder.calls, ModuleInitializer(copy.deepcopy(module)))
    for key, calls in recorder.calls.items():
        if not calls:
            raise WrongModel(name, f"its reset_parameters leaves {key} unset", "set it there")
    return {key: ElementwiseInitializer(tuple(calls)) for key, calls in recorder.calls.items()}


def _describe_module(prefix: str, module: nn.Module) -> str:
    return f"{prefix} ({type(module).__name__})" if prefix else type(module).__name__


def _stand_in(module: nn.Module, parameter: Callable[[Tensor], Tensor]) -> nn.Module:
    """A copy of the module with new parameters, and with the same children."""
    stand_in = copy.copy(module)
    stand_in._buffers, stand_in._modules = dict(module._buffers), dict(module._modules)
    stand_in._parameters = {
        key: None if p is None else nn.Parameter(parameter(p), requires_grad=False)
        for key, p in module._parameters.items()
    }
    return stand_in


def _storages(module: nn.Module) -> dict[str, torch.UntypedStorage]:
    return {key: p.untyped_storage() for key, p in module.named_parameters(recurse=False)}


class _Recorder(TorchDispatchMode):
    """Records the in-place calls on a module's parameters, and whether nothing else is done with their values."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.storages = _storages(module)
        self.calls: dict[str, list[Call]] = {key: [] for key in self.storages}
        self.elementwise = True
        self._parameters = dict(module.named_parameters(recurse=False))
        self._keys = {id(storage): key for key, storage in self.storages.items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        on_parameters = any(id(tensor.untyped_storage()) in self._keys for tensor in tensors)
        if on_parameters and not func.is_view and func.namespace != "prim":
            alone = len(tensors) == 1 and tensors[0] is args[0] and not kwargs
            self.elementwise &= alone and self._record(func.__name__.partition(".")[0], *args)
        return func(*args, **kwargs)

    def _record(self, method: str, view: Tensor, *args: float | None) -> bool:
        """Whether the call can be made on any part of the parameter separately."""
        key = self._keys[id(view.untyped_storage())]
        box = _box(view, self._parameters[key])
        whole = box == tuple(slice(0, size) for size in self._parameters[key].shape)
        if (
            not box
            or method not in SETTING_METHODS | CHANGING_METHODS
            or not (self.calls[key] or (whole and method in SETTING_METHODS))
        ):
            return False
        self.calls[key].append(Call(method, args, None if whole else box))
        return True


def _box(view: Tensor, whole: Tensor) -> tuple[slice, ...]:
    """The box of a contiguous tensor that a view covers; () if it covers none, or has permuted or merged dims."""
    dims = [(size, stride) for size, stride in zip(view.shape, view.stride(), strict=True) if size != 1]
    box, offset = [], int(view.storage_offset())
    for size, stride in zip(whole.shape, whole.stride(), strict=True):
        start, offset = divmod(offset, stride)
        shown = dims.pop(0)[0] if dims and dims[0][1] == stride and start + dims[0][0] <= size else 1
        box.append(slice(start, start + shown))
    return () if dims else tuple(box)


def _overlap(box: tuple[slice, ...], start: Sequence[int]) -> tuple[slice, ...]:
    """The box in the coordinates of a tile that begins at `start`."""
    return tuple(
        slice(max(part.start - first, 0), max(part.stop - first, 0))
        for part, first in zip(box, start, strict=True)
    )
