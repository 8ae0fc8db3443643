"""Sharded matmuls on integers: sums of integers do not depend on their order, so every result must match bitwise.

Each kind of layer that multiplies is sharded alone, by its own rule and the data plan, with integer weights, inputs and
upstream gradients, and compared with the unsharded layer.
"""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from tpresearch.config.axes import TENSOR, MeshSizes
from tpresearch.config.schema import Config, Dtype
from tpresearch.config.validate import has_master_weights
from tpresearch.config.world import World
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh, data_rank
from tpresearch.parallel.reducer import build_reducer
from tpresearch.parallel.weights import set_parameter
from tpresearch.plan.compiler import Plan
from tpresearch.plan.meta import weight_dtype
from tpresearch.plan.rules import ResolvedRule, runs_as
from tpresearch.train.preflight import preflight
from tpresearch.verify.trace import full_tensors

MAX_INTEGER, TERMS = 2, 64
"""Integers from -2 to 2, of which about 64 in a row of inputs or gradients are not 0: however long a row is, its sums with weights
stay small enough to be exact even in bfloat16."""


@dataclass(frozen=True)
class IntegerResult:
    """Difference of a sharded layer from the unsharded one, on integers: each number must be 0."""

    layer: str
    rule: str
    output: float
    input_gradient: float
    weight_gradient: float

    @property
    def differences(self) -> tuple[float, float, float]:
        return self.output, self.input_gradient, self.weight_gradient

    @property
    def passed(self) -> bool:
        return not any(self.differences)


def check_matmuls(world: World, cfg: Config) -> list[IntegerResult]:
    """Each distinct matmul of the model under its plan, compared with the unsharded one, on this rank."""
    job = preflight(cfg, world)
    assert job.device
    with process_group(job.device, world):
        mesh = build_mesh(job.sizes, job.device.type)
        return [
            _compare(name, layer, rule, job.plan, cfg, mesh, job.device.torch)
            for name, layer, rule in _layers(job.model, job.plan)
        ]


def max_over_ranks(ranks: list[list[IntegerResult]]) -> list[IntegerResult]:
    """Maximum differences of each layer over all ranks."""
    return [
        IntegerResult(
            layer[0].layer, layer[0].rule, *map(max, zip(*(each.differences for each in layer), strict=True))
        )
        for layer in zip(*ranks, strict=True)
    ]


def _layers(model: nn.Module, plan: Plan) -> list[tuple[str, nn.Module, ResolvedRule | None]]:
    """The first layer of each shape and rule. The layouts of a custom ParallelStyle are unknown, and a forward that is not torch's
    may do more with integers than add and multiply them."""
    found: dict[object, tuple[str, nn.Module, ResolvedRule | None]] = {}
    for name, module in model.named_modules():
        rule = plan.rules.get(name)
        is_plain = runs_as(module, nn.Linear) or runs_as(module, nn.Embedding)
        if isinstance(module, nn.Linear | nn.Embedding) and is_plain and not (rule and rule.rule.target):
            kind = type(module), tuple(module.weight.shape), rule and rule.name
            found.setdefault(kind, (name, module, rule))
    return list(found.values())


def _compare(
    name: str,
    layer: nn.Module,
    rule: ResolvedRule | None,
    plan: Plan,
    cfg: Config,
    mesh: DeviceMesh,
    device: torch.device,
) -> IntegerResult:
    dtype = torch.bfloat16 if cfg.train.dtype is Dtype.bfloat16 else weight_dtype(cfg.train)
    layer.requires_grad_()  # a frozen one multiplies alike
    x, upstream = _operands(layer, plan.sizes)
    unsharded = copy.deepcopy(layer).to_empty(device="cpu").double()
    for parameter in unsharded.parameters():
        parameter.data = _integers(*parameter.shape)
    expected = unsharded(x)
    expected.backward(upstream)

    # As a model, so that it is sharded by the code that shards every model.
    alone = nn.Sequential(OrderedDict(layer=layer))
    rules = {"layer": rule} if rule else {}
    plan = Plan(rules, ["layer"], [], plan.sizes)
    home = torch.device("cpu") if cfg.parallel.fsdp.cpu_offload else device
    parallelize(alone, plan, cfg.parallel, mesh, cfg.train.dtype).to_empty(device=home)
    if has_master_weights(cfg, plan.sizes):
        alone.bfloat16()  # as the copies that the model computes with
    parameters = dict(alone.named_parameters())
    for key, parameter in parameters.items():
        set_parameter(parameter, unsharded.get_parameter(key.removeprefix("layer.")).detach())
    reducer = build_reducer(alone, parameters, plan, cfg, mesh)
    src, dst = (rule.src[0], rule.dst[0]) if rule else (Replicate(), Replicate())
    part_of = functools.partial(_local_part, mesh, plan.sizes)
    part = part_of(src, x.detach()).to(device)
    part = part.to(dtype).requires_grad_() if x.requires_grad else part
    output = alone(part)
    own = part_of(dst, upstream).to(device, output.dtype)
    if isinstance(output, DTensor):
        own = DTensor.from_local(
            own, output.device_mesh, output.placements, shape=output.shape, stride=output.stride()
        )
    output.backward(own)
    if reducer:
        reducer.finish()
    gradients = full_tensors({key.removeprefix("layer."): p.grad for key, p in alone.named_parameters()})
    return IntegerResult(
        name,
        f"{rule.name} ({rule.label})" if rule else "",
        _max_difference(output, part_of(dst, expected)),
        _max_difference(part.grad, part_of(src, x.grad)) if x.grad is not None else 0.0,
        max(_max_difference(gradients.get(key), p.grad) for key, p in unsharded.named_parameters()),
    )


def _operands(layer: nn.Module, sizes: MeshSizes) -> tuple[Tensor, Tensor]:
    """x and the gradient of the output, of the global batch: the same on every rank. float64, or int64 token ids."""
    rows, tokens = sizes.world, 4 * sizes.tp
    if isinstance(layer, nn.Embedding):
        ids = torch.arange(rows * tokens).mul(7919).remainder(layer.num_embeddings)
        return ids.view(rows, tokens), _few_integers(rows, tokens, layer.embedding_dim)
    assert isinstance(layer, nn.Linear)
    x = _few_integers(rows, tokens, layer.in_features)
    return x.requires_grad_(), _few_integers(rows, tokens, layer.out_features)


def _integers(*shape: int) -> Tensor:
    """Integers from -MAX_INTEGER to MAX_INTEGER in a pseudo-random order that is the same on every rank."""
    drawn = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-MAX_INTEGER, MAX_INTEGER + 1, shape, generator=drawn).double()


def _few_integers(*shape: int) -> Tensor:
    """The same, but about TERMS in each row, at most, are not 0."""
    drawn = torch.Generator().manual_seed(sum(shape) + 1)
    return _integers(*shape) * (torch.rand(shape, generator=drawn) * shape[-1] < TERMS)


def _local_part(mesh: DeviceMesh, sizes: MeshSizes, layout: Placement | None, tensor: Tensor) -> Tensor:
    """This rank's part of a tensor of the global batch: its rows, and of those its shard over tp."""
    rows = tensor.chunk(sizes.dp)[data_rank(mesh)]
    if not isinstance(layout, Shard):
        return rows
    parts, own = rows.chunk(sizes.tp, layout.dim), mesh.get_local_rank(TENSOR.name)
    return parts[own] if own < len(parts) else rows.narrow(layout.dim, 0, 0)


def _max_difference(ours: Tensor | None, expected: Tensor | None) -> float:
    """The maximum difference; 0 if all are equal, infinite if the shapes differ or one is NaN."""
    if ours is None or expected is None:
        return float("inf")
    local = ours.to_local() if isinstance(ours, DTensor) else ours
    if local.shape != expected.shape:
        return float("inf")
    difference = (local.detach().to("cpu", torch.float64) - expected.detach()).abs().nan_to_num(torch.inf)
    return difference.max().item() if difference.numel() else 0.0
