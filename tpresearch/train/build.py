"""From a typed config to a sharded model with its first weights."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from tpresearch.config.errors import ConfigError, nearest
from tpresearch.config.mesh import MeshSizes
from tpresearch.config.schema import Config, Dtype, ModelConfig
from tpresearch.config.validate import micro_batch_size
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.initializers import read_initializers
from tpresearch.parallel.weights import from_seed, materialize
from tpresearch.plan.compiler import Plan, compile_plan
from tpresearch.plan.rules import class_at
from tpresearch.train.defects import weights_seed
from tpresearch.train.inputs import check_inputs, check_outputs


def meta_model(config: ModelConfig, dtype: Dtype = Dtype.float32) -> nn.Module:
    """The model without storage.

    Raises:
        ConfigError: for a class that cannot be imported or does not take these settings.
    """
    build = _model_class(config)
    accepted = inspect.signature(build).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values())
    for key, value in config.args.items():
        if key not in accepted and not takes_any:
            raise ConfigError(
                f"model.{key}",
                value,
                f"{build.__name__} has no such setting",
                "one of " + ", ".join(nearest(key, accepted)),
                fix={f"model.{key}": None},
            )
    try:
        with torch.device("meta"):
            model = build(**config.args)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            "model", config.name, f"{build.__name__} refuses it: {error}", "settings that it accepts"
        ) from error
    return model.to(weight_dtype(dtype))


def weight_dtype(dtype: Dtype) -> torch.dtype:
    """In which weights are kept. bfloat16 is a matter of computing: its weights are float32."""
    return torch.float64 if dtype is Dtype.float64 else torch.float32


def _model_class(config: ModelConfig) -> type[nn.Module]:
    try:
        found = class_at(config.target)
    except Exception as error:  # an import runs the user's own code, which may raise anything
        raise ConfigError(
            "model._target_",
            config.target,
            f"cannot be imported ({error})",
            "the path of a class",
            fix={"model._target_": None},
        ) from error
    if not issubclass(found, nn.Module):
        raise ConfigError(
            "model._target_",
            config.target,
            "not an nn.Module",
            "a subclass of torch.nn.Module",
            fix={"model._target_": None},
        )
    return found


def planned(cfg: Config, sizes: MeshSizes) -> tuple[nn.Module, Plan]:
    """The model on the meta device, and its plan compiled against it: no ranks, no memory.

    Raises:
        ConfigError: from the model, the plan compiler, or where the model and the data do not fit each other.
    """
    model = meta_model(cfg.model, cfg.train.dtype)
    check_inputs(model, cfg)
    read_initializers(model)  # refuses what has no first weights, before there are ranks
    rows = micro_batch_size(cfg, sizes)
    plan = compile_plan(model, cfg.model, cfg.parallel, sizes, cfg.data.seq_len, rows)
    check_outputs(model, plan, cfg)
    return model, plan


def sharded(model: nn.Module, plan: Plan, cfg: Config, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    """A planned model, sharded over the mesh, with the weights that (seed, name) gives."""
    initializers = read_initializers(model)
    parallelize(model, plan, cfg.parallel, mesh, cfg.train.dtype)
    home = torch.device("cpu") if cfg.parallel.fsdp.cpu_offload else device
    materialize(model, home, from_seed(initializers, weights_seed(cfg, mesh)), buffers=device)
    return model
