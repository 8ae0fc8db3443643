"""A forward pass of a batch over the meta model: whether they are compatible, and where no gradient flows back."""

from __future__ import annotations

import copy
import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tpresearch.config.errors import WrongModel
from tpresearch.config.schema import Config
from tpresearch.plan.compatible import check_lookup, incompatible, leaves_between
from tpresearch.plan.meta import (
    buffer_versions,
    changed_buffers,
    elements_of,
    numbers_of,
    python_states,
    same_draws,
    seen_checkpoints,
    transform_of_torch,
)

Shapes = tuple[torch.Size | None, ...]
PYTHON = "python"
_MATMULS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class CallShapes(NamedTuple):
    """The shape of each input and output of a module, by position; None for what is not a tensor."""

    inputs: Shapes
    outputs: Shapes
    is_last: bool
    """No layer with parameters was called after it."""


@dataclass(frozen=True)
class Probe:
    """What a forward pass over shapes shows about a model."""

    output: torch.Size | None = None
    """The shape of the model's output; None if the model cannot run on the meta device."""
    no_input_grad: set[str] = field(default_factory=set)
    """Modules whose input depends on no parameter and therefore needs no gradient."""
    head: str | None = None
    """The output layer that a model passes to `head` together with the hidden states."""
    draws: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """By the name of a module that draws random numbers, as dropout does, and by that of a function that draws there: for each
    call in a micro-batch, the number of elements of its first tensor (see `elements_of`). `PYTHON` stands for draws by the generators
    of Python and NumPy, which are noted as the model's."""
    shapes: dict[str, CallShapes] = field(default_factory=dict)
    """By module name, for modules that were called."""
    read_outside_forward: dict[str, set[str]] = field(default_factory=dict)
    """Modules with a parameter that is read outside of their own forward, as by `linear(x, self.embedding.weight)`: the modules
    whose forward ran at each such read."""
    changed_state: tuple[str, ...] = ()
    """Buffers that a forward in training changes, as the statistics of a batch norm, and numbers that modules keep, as a count of calls."""
    differentiated: dict[str, bool] = field(default_factory=dict)
    """Parameters through which a forward takes a gradient of its own, by `autograd.grad` or by a transform of torch.func, and whether
    backward then goes through that gradient."""
    transformed: set[str] = field(default_factory=set)
    """Modules that a transform of torch.func calls, such as vmap."""
    called: list[str] = field(default_factory=list)
    """Names of modules in the order in which they were called, one per call."""
    matmul_flops: dict[str, float] = field(default_factory=dict)
    """By the first name of each weight that multiplies, as a parameter: FLOPs of forward and backward per token of the batch."""
    changed_outputs: set[str] = field(default_factory=set)
    """Modules that return a view, which is changed in place afterwards."""
    recomputed: set[str] = field(default_factory=set)
    """Modules that are called in a checkpoint of the model's own."""
    ops: int = 0
    """Number of ops that it ran."""

    @property
    def may_branch(self) -> bool:
        """Whether ranks may come to different parameters: by the values of their rows, or by draws of Python's and NumPy's generators."""
        return self.output is None or PYTHON in self.draws.get("", {})


class _CallMode(TorchFunctionMode):
    """Notes for `_ProbeMode` each call of a function, and in which of them random numbers are drawn: `dropout`, say."""

    def __init__(self, probe: _ProbeMode) -> None:
        super().__init__()
        self._probe = probe

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        draws, name = self._probe.draws, getattr(func, "__name__", "")
        before = len(draws)
        if func is torch.autograd.grad and not transform_of_torch():
            self._probe.note_gradient(*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        draws[before:] = [(module, name) for module, _ in draws[before:]][:1]
        if self._probe.running:
            call = self._probe.running[-1], name, elements_of((args, kwargs), output) or 0
            self._probe.calls.append(call)
        return output


class _ProbeMode(TorchDispatchMode):
    """Records a `Probe` while a model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._owners = {
            id(p): name for name, module in model.named_modules() for p in module.parameters(recurse=False)
        }
        self._weights = {p.untyped_storage(): (name, p) for name, p in model.named_parameters()}
        self._buffers, self._numbers = buffer_versions(model), numbers_of(model)
        self._found = Probe()
        self.running: list[str] = []
        self.calls: list[tuple[str, str, int]] = []
        """Of functions: by which module, of which, and for how many elements."""
        self.draws: list[tuple[str, str]] = []
        """By which module, and in a call of which function."""
        self._ops = self._layers_called = 0
        self._flops = Counter[str]()
        self._shapes: dict[str, tuple[Shapes, Shapes, int]] = {}
        self._views: list[tuple[str, Tensor, int]] = []
        """Outputs of modules, and how often each was changed in place before it was returned."""
        self._last: dict[torch.UntypedStorage, int] = {}
        """Of numbers that count, as positions do, the last."""

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        with ExitStack() as stack:
            for name, module in model.named_modules():
                stack.enter_context(module.register_forward_pre_hook(partial(self._before_forward, name)))
                stack.enter_context(module.register_forward_hook(partial(self._after_forward, name)))
            stack.enter_context(self)
            stack.enter_context(_CallMode(self))
            self._checkpoints = stack.enter_context(seen_checkpoints())
            yield

    def _before_forward(self, name: str, module: nn.Module, args: tuple[object, ...]) -> None:
        self._layers_called += any(True for _ in module.parameters(recurse=False))
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        self.running.append(name)
        self._found.called.append(name)
        self._found.recomputed.update([name] if self._checkpoints else [])
        if not any(tensor.requires_grad for tensor in tensors):
            self._found.no_input_grad.add(name)
        if transform := transform_of_torch():
            self._found.transformed.add(name)
            names = (f"{name}.{key}".strip(".") for key in module._parameters)
            self._found.differentiated.update(dict.fromkeys(names if transform == "Grad" else (), True))

    def _after_forward(self, name: str, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        self.running.pop()
        outputs = output if isinstance(output, tuple) else (output,)
        self._shapes[name] = _shapes_of(args), _shapes_of(outputs), self._layers_called
        self._views += [(name, t, t._version) for t in outputs if isinstance(t, Tensor) and t._is_view()]

    def note_gradient(
        self,
        outputs: object,
        inputs: object,
        _: object = None,
        __: object = None,
        create_graph: bool = False,
        **___: object,
    ) -> None:
        for storage in (leaf.untyped_storage() for leaf in leaves_between(outputs, inputs)):
            if storage in self._weights:
                name = self._weights[storage][0]
                self._found.differentiated[name] = create_graph or self._found.differentiated.get(name, False)

    def result(self, output: Tensor, head: str | None, model: nn.Module, tokens: int) -> Probe:
        """What was recorded, once the model has returned."""
        found = self._found
        for name, (inputs, outputs, called) in self._shapes.items():
            found.shapes[name] = CallShapes(inputs, outputs, called == self._layers_called)
        for module, function in dict.fromkeys(self.draws):
            calls = [n for called_by, called, n in self.calls if (called_by, called) == (module, function)]
            found.draws.setdefault(module, {})[function] = calls
        found.changed_outputs.update(name for name, view, version in self._views if view._version != version)
        counts = (name for name, now in numbers_of(model).items() if self._numbers.get(name, now) != now)
        changed = *changed_buffers(model, self._buffers), *counts
        flops = {name: of_batch / tokens for name, of_batch in self._flops.items()}
        seen = replace(found, output=output.shape, head=head, changed_state=changed)
        return replace(seen, matmul_flops=flops, ops=self._ops)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._ops += 1
        reader = self.running[-1] if self.running else None
        if torch.Tag.nondeterministic_seeded in func.tags and reader is not None:
            self.draws.append((reader, ""))
        if func is torch.ops.aten.embedding.default:
            check_lookup(args[0], args[1], self._last)
        owners = {self._owners.get(id(tensor), reader) for tensor in tree_leaves((args, kwargs))}
        running, outside = set(self.running), self._found.read_outside_forward
        for owner in owners:
            if owner is not None and owner != reader:
                outside[owner] = outside.get(owner, running) & running
        output = func(*args, **(kwargs or {}))
        if func in _MATMULS:
            first, second = args[-2:]
            self._note_multiplying(first, second, output.numel() * first.shape[-1])
        elif func is torch.ops.aten.convolution.default:
            given, weight = args[:2]
            self._note_multiplying(
                given, weight, (given if args[6] else output).numel() * math.prod(weight.shape[1:])
            )
        if func._schema.is_mutable:
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, Tensor):
                    self._last.pop(tensor.untyped_storage(), None)
        if func.overloadpacket is torch.ops.aten.arange and all(isinstance(arg, int) for arg in args):
            self._last |= {output.untyped_storage(): number for number in range(*args)[-1:]}
        return output

    def _note_multiplying(self, first: Tensor, second: Tensor, products: int) -> None:
        """Of a weight 2 FLOPs per product in forward, and in backward 2 each for its gradient and for that of the other factor. The
        latter counts in any case where the weight is trained, as in 6N."""
        for factor, other in ((first, second), (second, first)):
            name, weight = self._weights.get(factor.untyped_storage(), ("", None))
            if weight is not None:
                each = 6 if weight.requires_grad else 4 if other.requires_grad else 2
                self._flops[name] += each * products


def probe_model(model: nn.Module, inputs: Tensor, cfg: Config) -> Probe:
    """Send `inputs`, on the meta device, through a copy of a meta model, which may count its calls.

    Raises:
        ConfigError: for data that the model does not accept, and an output that is not a tensor.
    """
    model = copy.deepcopy(model)
    try:
        with same_draws():
            seeded = python_states()
            output, watch, head = _run_with_head(model, inputs) or (*_run(model, inputs), None)
            draws = python_states() != seeded
    except NotImplementedError:  # an op that has no meaning without data
        return Probe()
    except Exception as error:
        if "meta" in str(error):  # a tensor of its own on another device
            return Probe()
        raise incompatible(inputs, cfg, error) from error
    if not isinstance(output, Tensor):
        why = f"its output is a {type(output).__name__}"
        legal = "a forward that returns one tensor: logits [b, s, V], or [b, ...] for train.loss=sum"
        raise WrongModel(cfg.model.name, why, legal)
    if not output.requires_grad and any(p.requires_grad for p in model.parameters()):
        why = "no gradient flows back from its output, as under torch.no_grad() or after detach()"
        raise WrongModel(cfg.model.name, why, "a forward whose output follows from the parameters")
    found = watch.result(output, head, model, len(inputs) * cfg.data.seq_len)
    if draws:
        found.draws.setdefault("", {})[PYTHON] = []
    return found


def _run(
    model: nn.Module, inputs: Tensor, **head: Callable[[nn.Module, Tensor], Tensor]
) -> tuple[object, _ProbeMode]:
    watch = _ProbeMode(model)
    with torch.device("meta"), watch.attached(model):
        return model(inputs, **head), watch


def _run_with_head(model: nn.Module, inputs: Tensor) -> tuple[object, _ProbeMode, str] | None:
    """As `_run`, and the output layer that the model passes to a `head` with the hidden states; None if it
    takes no such argument."""
    if "head" not in inspect.signature(model.forward).parameters:
        return None
    given: list[nn.Module] = []

    def head(layer: nn.Module, hidden: Tensor) -> Tensor:
        given.append(layer)
        logits: Tensor = layer(hidden)
        return logits

    try:
        output, watch = _run(model, inputs, head=head)
    except Exception:  # its argument `head` means something else
        return None
    name = next((name for name, module in model.named_modules() if given and module is given[0]), None)
    return (output, watch, name) if name else None


def _shapes_of(values: tuple[object, ...]) -> Shapes:
    return tuple(value.shape if isinstance(value, Tensor) else None for value in values)
