"""A plan's results, step by step, as full tensors; and the comparison of two such traces: the maximum error of each
quantity, and where it occurs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from tpresearch.config.axes import DATA_AXES
from tpresearch.config.schema import Config, Dtype
from tpresearch.config.world import World
from tpresearch.data.rows import AnyCorpus
from tpresearch.parallel.device import Device
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh, sum_over
from tpresearch.train.assemble import assemble
from tpresearch.train.observe import Observer
from tpresearch.train.preflight import preflight
from tpresearch.train.shapes import refusing_shapes
from tpresearch.train.state import TrainState

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class MaxError:
    """The maximum relative error of one quantity, over all steps and parameters."""

    error: float
    step: int | None = None
    """Step, counted from 0; None for quantities before the first step."""
    parameter: str | None = None


@dataclass(frozen=True)
class StepTrace:
    """One optimizer step: global values and whole tensors, in float64 on the CPU."""

    loss: float
    grad_norm: float
    """Before clipping."""
    gradients: Tensors
    """Before clipping, by parameter name."""
    weights: Tensors
    """After the update, by parameter name."""
    held_out: float | None
    """The loss on held-out rows after the update."""


@dataclass(frozen=True)
class RunTrace:
    initial: Tensors
    """The weights before the first step."""
    steps: list[StepTrace]
    rank_differences: list[MaxError] = field(default_factory=list)
    """Maximum differences between ranks: see `differences_between_ranks`."""


class GradientCapture(Observer):
    """Keeps the last step's full gradients, before clipping."""

    def __init__(self) -> None:
        self.last: Tensors = {}

    def gradients(self, state: TrainState) -> None:
        self.last = full_tensors({name: p.grad for name, p in state.trained_parameters().items()})


def trace_run(
    cfg: Config, corpus: AnyCorpus, world: World, steps: int, device: Device | None = None
) -> RunTrace:
    """Train for a few steps on this rank of a job, with an evaluation after each, through the same code as every run.

    Args:
        device: the one that the config chooses, unless given.

    Returns: this rank's trace; `rank_differences` tells whether all ranks agree.
    """
    job = preflight(cfg, world)
    device = device or job.device
    assert device
    with process_group(device, world), refusing_shapes(cfg.model.name, job.plan):
        mesh, capture = build_mesh(job.sizes, device.type), GradientCapture()
        loop = assemble(job, mesh, device, corpus, [capture])
        initial, taken = whole_weights(loop.state), []
        differences = differences_between_ranks(None, initial, device.torch)
        for step in range(steps):
            share, norm = loop.step()
            loss = sum_over(mesh, share, DATA_AXES)
            updated = whole_weights(loop.state)
            alike = {"loss": loss.cpu().double(), "grad norm": norm.cpu().double()}
            alike |= {f"gradient of {name}": gradient for name, gradient in capture.last.items()} | updated
            differences += differences_between_ranks(step, alike, device.torch)
            taken.append(StepTrace(loss.item(), norm.item(), capture.last, updated, loop.evaluate()))
        return RunTrace(initial, taken, differences)


def whole_weights(state: TrainState) -> Tensors:
    """Every weight as the optimizer updates it, gathered."""
    with state.weights() as weights:
        return full_tensors(weights)


def full_tensors(tensors: Mapping[str, Tensor | None]) -> Tensors:
    """Every tensor gathered from all ranks that hold a shard of it, in float64 on the CPU."""
    gathered = {}
    for name, tensor in tensors.items():
        if tensor is not None:
            if isinstance(tensor, DTensor):  # NCCL gathers nothing that is offloaded to the CPU
                there = tensor.to(tensor.device_mesh.device_type)
                assert isinstance(there, DTensor)
                tensor = there.full_tensor()
            gathered[name] = tensor.detach().to("cpu", torch.float64, copy=True)
    return gathered


def differences_between_ranks(step: int | None, tensors: Tensors, device: torch.device) -> list[MaxError]:
    """The maximum difference between any two ranks' copies of each tensor, relative to its maximum."""
    if dist.get_world_size() == 1:
        return []
    flat = torch.cat([tensor.flatten() for tensor in tensors.values()]).to(device)
    flat[flat.isnan()] = torch.inf  # gloo's least and greatest of numbers pass over a NaN
    least, most = flat.clone(), flat.clone()
    dist.all_reduce(least, dist.ReduceOp.MIN)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    sizes = [tensor.numel() for tensor in tensors.values()]
    differences = zip((most - least).split(sizes), most.abs().split(sizes), strict=True)
    scaled = (_greatest(a) / (_greatest(s) or 1.0) for a, s in differences)
    return [MaxError(error, step, name) for name, error in zip(tensors, scaled, strict=True)]


TOLERANCES = {Dtype.float64: 1e-10, Dtype.float32: 1e-4, Dtype.bfloat16: 1e-1}
"""Tolerance for rounding: a plan sums in another order."""

WEIGHT_TOLERANCES = {Dtype.float64: 1e-10, Dtype.float32: 1e-3, Dtype.bfloat16: 5e-1}
"""Of updated weights: AdamW divides by small gradients. Those of plans were up to 1.5e-4 apart in float32, 0.13 in bfloat16."""

EXACT = ("initial weights", "between ranks")
"""Quantities that must match bitwise."""


def compare(ours: RunTrace, reference: RunTrace) -> dict[str, MaxError]:
    """The maximum error of each quantity. A tensor's error is relative to the maximum of its layer's tensors in the reference:
    some biases have gradients that cancel, as those of keys do in a softmax, so that they are rounding errors of what was added.

    Initial weights do not depend on the order of any sum: they must match bitwise, and so must replicated
    values on all ranks.
    """
    steps = list(enumerate(zip(ours.steps, reference.steps, strict=True)))

    def of_number(get: Callable[[StepTrace], float]) -> MaxError:
        return _max_error(MaxError(_relative_error(get(a), get(b)), k) for k, (a, b) in steps)

    def of_tensors(get: Callable[[StepTrace], Tensors]) -> MaxError:
        return _max_error(worst for k, (a, b) in steps for worst in _tensor_errors(k, get(a), get(b)))

    return {
        "initial weights": _max_error(_tensor_errors(None, ours.initial, reference.initial)),
        "loss": of_number(lambda step: step.loss),
        "grad norm": of_number(lambda step: step.grad_norm),
        "gradients": of_tensors(lambda step: step.gradients),
        "weights": of_tensors(lambda step: step.weights),
        "between ranks": _max_error(ours.rank_differences or [MaxError(0.0)]),
        "held-out loss": of_number(lambda step: step.held_out or 0.0),
    }


def tolerance(quantity: str, dtype: Dtype) -> float:
    if quantity in EXACT:
        return 0.0
    return WEIGHT_TOLERANCES[dtype] if quantity == "weights" else TOLERANCES[dtype]


def out_of_tolerance(worst: Mapping[str, MaxError], dtype: Dtype) -> list[str]:
    """The quantities whose error is too large, or NaN."""
    return [quantity for quantity, w in worst.items() if not w.error <= tolerance(quantity, dtype)]


def _max_error(errors: Iterable[MaxError]) -> MaxError:
    """The maximum; NaN counts as larger than any number."""
    return max(errors, key=lambda worst: (worst.error != worst.error, worst.error))


def _relative_error(ours: float, reference: float) -> float:
    return abs(ours - reference) / abs(reference) if reference else abs(ours)


def _tensor_errors(step: int | None, ours: Tensors, reference: Tensors) -> list[MaxError]:
    if ours.keys() != reference.keys():
        missing = next(iter(ours.keys() ^ reference.keys()))
        return [MaxError(float("inf"), step, missing)]
    scales: dict[str, float] = {}
    for name, tensor in reference.items():
        layer = name.rpartition(".")[0]
        scales[layer] = max(scales.get(layer, 0.0), _greatest(tensor))
    found = []
    for name, tensor in reference.items():
        scale = scales[name.rpartition(".")[0]] or 1.0
        found.append(MaxError(_greatest(ours[name] - tensor) / scale, step, name))
    return found


def _greatest(tensor: Tensor) -> float:
    """The greatest absolute value; 0 of no elements."""
    return tensor.abs().max().item() if tensor.numel() else 0.0
