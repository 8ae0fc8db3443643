"""The model of a config on the meta device: modules and shapes, without storage."""

from __future__ import annotations

import inspect
import itertools
import random
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.utils.parametrize import is_parametrized
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from tpresearch.config.errors import ConfigError, WrongModel
from tpresearch.config.model import ModelConfig
from tpresearch.config.near_names import nearest
from tpresearch.config.training import TrainConfig
from tpresearch.config.values import check_value, imported_class
from tpresearch.plan.constructor import Change, change_by, lost_changes
from tpresearch.plan.initializers import CHANGING_METHODS

MAX_MODULES = 10_000
"""More than 64 experts in each of 28 layers have, or a Llama2 with 700 layers. A mistyped depth would keep Python busy for hours."""

DRAWING = (nn.init.normal_, nn.init.uniform_)
"""They reach a mode with their tensor as an argument by name."""


def meta_model(config: ModelConfig, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model without storage, its parameters in this dtype: see `plain_model`."""
    return plain_model(config, dtype, "meta")


def watched_meta_model(config: ModelConfig, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Change]]:
    """The same, and by parameter what its constructor sets and `reset_parameters` does not, for `check_constructor`."""
    changes: list[Change] = []
    model = _construct(config, "meta", changes)
    lost = lost_changes(model, changes)
    return _in_dtype(model, dtype), lost


def plain_model(config: ModelConfig, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """The model as its class makes it, its parameters in this dtype: the one in which weights are kept, `weight_dtype`.
    Buffers are widened with them, and never narrowed: bfloat16 would blunt a rotary table.

    Raises:
        ConfigError: for a class that cannot be imported or does not take these settings, and for a parameter that could
            not be kept as it is.
    """
    return _in_dtype(_construct(config, device), dtype)


def _construct(config: ModelConfig, device: str, changes: list[Change] | None = None) -> nn.Module:
    """The model as its class makes it; `changes` gets those of values in place."""
    build = imported_class("model._target_", config.target, nn.Module)
    _check_settings(config, build)
    try:
        with torch.device(device), _module_limit(), _SkipValueChanges(changes), same_draws():
            model = build(**config.args)
    except Exception as error:  # it is user code, which may raise anything
        why = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        why, legal = f"{build.__name__} refuses it: {why}", "settings that it accepts"
        fix = {f"model.{key}": None for key in config.args}
        raise ConfigError("model", config.name, why, legal, fix=fix) from error
    _check_parameters(model)
    return model


@contextmanager
def same_draws() -> Iterator[None]:
    """Context in which a model draws the same numbers on each rank and at each start, such as which features it connects or which
    blocks it leaves out: Python and NumPy would seed each process apart. A caller's generators are left as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([]):
        random.seed(0)
        np.random.seed(0)
        torch.default_generator.manual_seed(0)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def python_states() -> tuple[object, ...]:
    """Of the generators that `random` and `numpy.random` share."""
    kind, key, *rest = np.random.get_state()
    return random.getstate(), kind, np.asarray(key).tobytes(), *rest


@contextmanager
def seen_checkpoints() -> Iterator[list[Any]]:
    """Context in which a model's own checkpoints call their functions as they are: a reentrant one, torch's default, would hide which
    tensors have a gradient (private; read in torch 2.11 to 2.14). Yields the functions that run."""
    running, module = list[Any](), torch.utils.checkpoint

    def direct(function: Any, _: bool, *args: Any) -> Any:
        running.append(function)
        follows = any(isinstance(x, Tensor) and x.requires_grad for x in args)
        with torch.set_grad_enabled(follows and torch.is_grad_enabled()):
            output = function(*args)
        running.pop()
        return output

    def watched(function: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        running.append(function)
        yield
        running.pop()

    other = "_checkpoint_without_reentrant_generator"
    other += "_impl" * hasattr(module, f"{other}_impl")  # since 2.14
    with patch.object(module.CheckpointFunction, "apply", direct), patch.object(module, other, watched):
        yield running


def _in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in model.parameters():  # FSDP shards no others, and to a model they are the same
        parameter.data = parameter.data.contiguous()
    if dtype is torch.bfloat16:
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)
        return model
    complex_dtype = torch.promote_types(dtype, torch.complex64)

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_complex():  # `Module.to` would drop its imaginary part
            return tensor.to(complex_dtype)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return model._apply(convert)


def _check_parameters(model: nn.Module) -> None:
    """Refuse what sharding would silently lose: mixed dtypes, imaginary parts, hooks on tensors that it replaces."""
    for name, module in model.named_modules():
        if is_parametrized(module):
            why = "it is parametrized, but a rank holds only shards of it"
            legal = "a module that does so in its forward"
            raise WrongModel(name or type(module).__name__, why, legal)
        if key := next((k for k, t in vars(module).items() if isinstance(t, Tensor) and not t.is_leaf), None):
            why = f"its {key} is computed from parameters as the model is built, as by torch.nn.utils.weight_norm, and a rank holds only shards of these"
            raise WrongModel(name or type(module).__name__, why, "a module that does so in its forward")
    first: torch.dtype | None = None
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype is not (first := first or parameter.dtype):
            why = f"it is {parameter.dtype} where others are {first}".replace("torch.", "")
            legal = "one dtype for all: the config sets the dtype in which they are kept"
            raise WrongModel(name, why, legal)
        if parameter.is_complex():
            why, legal = "its numbers are complex", "real and imaginary part as two parameters"
            raise WrongModel(name, why, legal)
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            why = "it has a hook on its gradient, which would be lost: sharding puts another parameter in its place"
            raise WrongModel(name, why, "an observer, or a hook on its module")


def _check_settings(config: ModelConfig, build: type[nn.Module]) -> None:
    """Refuse settings that the class does not have, or of another type than it says."""
    accepted = inspect.signature(build).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    try:
        hints = typing.get_type_hints(build.__init__)
    except (NameError, AttributeError, TypeError):  # such as a name that only a type checker imports
        hints = {}
    for key, value in config.args.items():
        if key not in accepted and not takes_any:
            why = f"{build.__name__} has no such setting"
            legal = "one of " + ", ".join(nearest(key, accepted))
            raise ConfigError(f"model.{key}", value, why, legal)
        check_value(f"model.{key}", value, hints.get(key, Any))


class _SkipValueChanges(TorchFunctionMode):
    """Skips calls that change or draw the values of a meta tensor, which has none: saves a millisecond per call."""

    def __init__(self, changes: list[Change] | None) -> None:
        super().__init__()
        self._changes = changes

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if self._changes is not None and (change := change_by(name, args, kwargs or {})):
            self._changes.append(change)
        if name in CHANGING_METHODS and args and args[0].is_meta:
            return args[0]
        if func in DRAWING and kwargs and kwargs["tensor"].is_meta:
            return kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def _module_limit() -> RemovableHandle:
    """A hook that, while entered, refuses to build a model with more than MAX_MODULES modules."""
    made = itertools.count(1)

    def count(*_: object) -> None:
        if next(made) > MAX_MODULES:
            raise ValueError(f"it has more than {MAX_MODULES:,} modules")

    return register_module_module_registration_hook(count)


Versions = list[tuple[str, Tensor, int]]
"""Of buffers: the name, the tensor, and how often it was changed in place."""


def buffer_versions(module: nn.Module) -> Versions:
    return [(name, buffer, buffer._version) for name, buffer in module.named_buffers()]


def changed_buffers(module: nn.Module, before: Versions) -> dict[str, Tensor]:
    """Those that have been changed in place or replaced since."""
    now = dict(module.named_buffers()) if before else {}
    return {name: t for name, t, version in before if now.get(name) is not t or t._version != version}


def numbers_of(model: nn.Module) -> dict[str, float]:
    """Numbers and flags that modules keep as attributes, by name."""
    return {
        f"{name}.{key}".removeprefix("."): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, int | float) and key != "training"
    }


def elements_of(args: object, output: object) -> int | None:
    """How many elements a random function draws for: those of its first tensor, on this rank; of its output if it is given none;
    None if neither has any."""
    for tensor in tree_leaves((args, output)):
        if isinstance(tensor, Tensor):
            return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()
    return None


def transform_of_torch() -> str | None:
    """Which transform of torch.func calls what runs now, such as Grad or Vmap (private; read in torch 2.11 to 2.14)."""
    functorch = torch._C._functorch
    if functorch.maybe_current_level() is None:
        return None
    return functorch.peek_interpreter_stack().key().name


def settings_with_defaults(config: ModelConfig) -> dict[str, Any]:
    """A model's settings, including the defaults of its class."""
    accepted = inspect.signature(imported_class("model._target_", config.target, nn.Module)).parameters
    defaults = {name: p.default for name, p in accepted.items() if p.default is not inspect.Parameter.empty}
    return {**defaults, **config.args}


def weight_dtype(train: TrainConfig) -> torch.dtype:
    """The dtype in which weights are kept and trained: train.dtype=bfloat16 is that of the computation alone, unless train.weights is too."""
    return getattr(torch, train.weight_dtype)
