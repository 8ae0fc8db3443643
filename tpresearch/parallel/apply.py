"""Apply a plan to a model, in a fixed order: TP/SP -> activation checkpointing -> compile -> FSDP."""

from __future__ import annotations

import functools
import sysconfig
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor.parallel import parallelize_module
from torch.utils._pytree import tree_map_only

from tpresearch.config.axes import LAYER_AXES, TENSOR
from tpresearch.config.errors import ConfigError, WrongModel, first_line
from tpresearch.config.schema import Checkpointing, Dtype, FsdpConfig, ParallelConfig
from tpresearch.config.validate import uses_fully_shard
from tpresearch.parallel.mesh import data_mesh
from tpresearch.parallel.recomputing import checked_compiled, checkpointed, checkpointed_eagerly
from tpresearch.plan.compiler import Plan
from tpresearch.plan.parameters import tie, tied_parameters


def parallelize(
    model: nn.Module, plan: Plan, parallel: ParallelConfig, mesh: DeviceMesh, dtype: Dtype
) -> nn.Module:
    """Shard a meta-device model in place and return it. Parameter names and ties are unchanged."""
    ties = tied_parameters(model)
    for axis in LAYER_AXES:
        styles = {name: rule.style() for name, rule in plan.rules.items() if rule.axis == axis}
        if styles:
            parallelize_module(model, mesh[axis], styles, src_data_rank=None)
    tie(model, ties)
    if parallel.compile:
        set_activation_budget(parallel)
        allow_compilations(len(plan.blocks))
    sums_at_once = not any(rule.rule.target for rule in plan.rules.values())  # which may leave a partial sum
    for name in plan.blocks:
        wrap_forward(model.get_submodule(name), parallel, bool(plan.rules), sums_at_once=sums_at_once)
    if parallel.async_tp:
        enable_async_tp(mesh[TENSOR.name])
    if uses_fully_shard(parallel, plan.sizes):
        apply_fsdp(model, plan, parallel.fsdp, data_mesh(mesh), dtype)
    return model


def wrap_forward(
    block: nn.Module,
    parallel: ParallelConfig,
    has_rules: bool,
    backend: str | Callable[..., Any] = "inductor",
    sums_at_once: bool = True,
) -> None:
    """Checkpoint and compile a block's forward; hooks on the block, including FSDP's, stay outside.

    Args:
        sums_at_once: see `checkpointed_eagerly`.
    """
    kind, compile = parallel.activation_checkpointing, functools.partial(compiled, backend=backend)
    if parallel.async_tp:
        compile = functools.partial(compile, options=ASYNC_TP)
    if not parallel.compile:
        block.forward = checkpointed_eagerly(block, kind, sums_at_once=sums_at_once)
        return
    block.register_forward_pre_hook(wait_for_inputs, with_kwargs=True)
    if kind is Checkpointing.full and has_rules:
        # Compiled as a whole, it would keep a DeviceMesh for backward, which torch 2.13 miscounts.
        block.forward = checkpointed_eagerly(block, kind, compile(block.forward))
    else:
        block.forward = checked_compiled(block, compile(checkpointed(block.forward, kind)))


ASYNC_TP = {"_micro_pipeline_tp": True}
"""Inductor's option for a graph whose matmuls are to overlap with their collectives (private; read in torch 2.11 to 2.14)."""


def compiled(forward: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compile to one graph for fixed shapes: a graph break is an error and another shape a recompilation, never silent.

    The result raises a ConfigError for what the compiler cannot trace, such as a print, a branch on a value or `.item()`,
    and for what it would compile again and again.
    """
    from torch._dynamo.exc import FailOnRecompileLimitHit, Unsupported, UserError  # late: it is the compiler

    run = torch.compile(forward, fullgraph=True, dynamic=False, **options)

    @functools.wraps(forward.func if isinstance(forward, functools.partial) else forward)
    def run_or_refuse(*args: Any, **kwargs: Any) -> Any:
        try:
            return run(*args, **kwargs)
        except (Unsupported, UserError) as error:
            raise _cannot_be_compiled(error) from None
        except FailOnRecompileLimitHit:
            times = torch._dynamo.config.recompile_limit
            why = f"a block was compiled {times} times in this process, each for other shapes or numbers in Python, and is given more"
            fix = {"parallel.compile": "false"}
            legal = "false, or blocks that are given the same at each step"
            raise ConfigError("parallel.compile", True, why, legal, fix=fix) from None

    return run_or_refuse


def allow_compilations(blocks: int) -> None:
    """Have torch compile the blocks' code as often as there are blocks, and 8 times more: one with a number of its own, such
    as its depth, is compiled for itself, and beyond 8 torch would refuse (2.11 to 2.14)."""
    config = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, blocks + 8)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, config.recompile_limit)


def _cannot_be_compiled(error: Exception) -> ConfigError:
    """The sentence for a graph break, with the line at which the model's own code has it or calls what has it (`real_stack`
    is private; read in torch 2.11 and 2.13)."""
    frames = list(getattr(error, "real_stack", None) or [])[::-1]
    libraries = sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")
    own = [frame for frame in frames if not frame.filename.startswith(libraries)]
    where = next((f", at {f.filename}:{f.lineno} ({f.line})" for f in own or frames), "")
    why = f"the compiler cannot trace a block: {first_line(error)}{where}"
    return ConfigError(
        "parallel.compile", True, why, "false, or a block without it", fix={"parallel.compile": "false"}
    )


def set_activation_budget(parallel: ParallelConfig) -> None:
    """Set the share of their activations that compiled blocks may keep for backward; the cheapest are recomputed
    (private; read in torch 2.11 to 2.14).
    """
    is_bounded = parallel.activation_checkpointing is Checkpointing.budget
    config = torch._functorch.config
    config.activation_memory_budget = parallel.activation_budget if is_bounded else 1.0
    if hasattr(config, "unsafe_treat_script_objects_as_zero_size"):
        config.unsafe_treat_script_objects_as_zero_size = is_bounded  # a mesh is one, and holds no tensors


class WaitForCollective(torch.autograd.Function):
    """Waits for a tensor that a collective is still producing; its gradient is a plain tensor."""

    @staticmethod
    def forward(ctx: Any, pending: Any) -> torch.Tensor:
        return pending.wait()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # pyrefly: ignore[bad-override]
        return gradient


def wait_for_inputs(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The inputs of a compiled block, such as the embedding's sum over tp, as plain tensors.

    A compiled function given an AsyncCollectiveTensor loses in backward that its gradient is a DTensor (torch 2.13).
    """
    return tree_map_only(AsyncCollectiveTensor, WaitForCollective.apply, (args, kwargs))


def apply_fsdp(model: nn.Module, plan: Plan, fsdp: FsdpConfig, mesh: DeviceMesh, dtype: Dtype) -> None:
    """`fully_shard` each block, the last one together with what follows it, embedding and output layer, then the root.

    Gradients are summed, not averaged, over data-parallel ranks: the loss is divided by the global token count.
    """
    precision = MixedPrecisionPolicy()
    if dtype is Dtype.bfloat16:
        # Inputs are left as they are: token ids, and a rotary table that bfloat16 would blunt.
        precision = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype(fsdp, dtype), cast_forward_inputs=False)
    offload = CPUOffloadPolicy() if fsdp.cpu_offload else OffloadPolicy()
    shard = functools.partial(fully_shard, mesh=mesh, mp_policy=precision, offload_policy=offload)
    for name in plan.blocks[:-1]:
        shard(model.get_submodule(name), reshard_after_forward=fsdp.reshard_after_forward)
    if last := [*plan.blocks[-1:], *plan.after_blocks]:
        # Backward begins with it: if freed, it would be gathered again at once.
        shard([model.get_submodule(name) for name in last], reshard_after_forward=False)
    for name in plan.end_layers:
        layer = model.get_submodule(name)
        is_embedding = isinstance(layer, nn.Embedding)  # whose backward reads indices, and no weight
        end = shard(layer, reshard_after_forward=is_embedding)
        end.set_unshard_in_backward(not is_embedding)
        if not is_embedding:
            cast(FSDPModule, model.get_submodule(plan.blocks[-1])).set_modules_to_forward_prefetch([end])
    shard(model)
    if plan.probe.output is not None:  # those that are changed in place afterwards are known, and refused
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    for module in fsdp_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def reduce_dtype(fsdp: FsdpConfig, dtype: Dtype) -> torch.dtype | None:
    """The dtype in which gradients are summed over data-parallel ranks; None for their own."""
    return getattr(torch, fsdp.reduce_dtype) if dtype is Dtype.bfloat16 else None


def unshard(layer: nn.Module) -> nn.Module:
    """The layer with gathered weights, where FSDP shards them: for `run_as_forward`."""
    if isinstance(layer, FSDPModule):
        layer.unshard()
    return layer


def run_as_forward(
    layer: nn.Module, use: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> torch.Tensor:
    """`use(x)`, which reads the layer's weights without calling its forward. FSDP treats it as a forward: it reduces
    the weights' gradients as soon as x has its own.
    """
    if not isinstance(layer, FSDPModule):
        return use(x)
    setattr(layer, "use", use)  # noqa: B010
    register_fsdp_forward_method(layer, "use")
    result: torch.Tensor = getattr(layer, "use")(x)  # noqa: B009
    delattr(layer, "use")  # it holds a batch
    return result


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(model: nn.Module) -> None:
    """Free the weights that a forward without a backward has left gathered, and clear its order, which the next backward
    would use to prefetch (private; read in torch 2.11 to 2.14).
    """
    for module in fsdp_modules(model):
        state = module._get_fsdp_state()
        if state._modules_to_run_forward:  # called in training alone: torch before 2.13 still waits for them
            state._modules_to_run_forward.clear()
            state._post_forward(cast(nn.Module, module), (), None)
        module.reshard()
        state._comm_ctx.post_forward_order.clear()


def check_summed(model: nn.Module) -> None:
    """Refuse a backward that has left gradients on this rank after `fully_shard` summed those of their unit (private; read in torch
    2.11 to 2.14)."""
    for module in fsdp_modules(model):
        group = module._get_fsdp_state()._fsdp_param_group
        for held in group.fsdp_params if group else ():
            left = getattr(held, "_unsharded_param", None)
            if left is not None and left.grad is not None:
                raise in_several_parts(str(held._param_fqn))


def in_several_parts(parameter: str) -> WrongModel:
    """For a gradient that goes on after ranks have begun to sum it."""
    why = "its gradient comes in several parts, as where torch.utils.checkpoint, whose default is use_reentrant=True, calls a layer more than once, and ranks sum the first alone"
    return WrongModel(parameter, why, "use_reentrant=False, which computes the same")


def enable_async_tp(tp_mesh: DeviceMesh) -> None:
    """Announce a group to inductor's pass for async TP, which leaves the matmuls of others alone (private; read in torch
    2.11 to 2.14, which deprecate this where symmetric memory is allocated by hand, and still require it here).
    """
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        enable_symm_mem_for_group(tp_mesh.get_group().group_name)
