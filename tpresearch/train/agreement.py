"""Checks between ranks: in the first steps, that what the plan holds to be replicated has one gradient on all ranks that share it;
and of models that may go different ways, that ranks gather the same weights, and sum the gradients of the same parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather, DefaultReduceScatter

from tpresearch.config.axes import DATA_AXES, LAYER_AXES
from tpresearch.config.errors import ConfigError
from tpresearch.config.schema import Config
from tpresearch.config.validate import total_steps
from tpresearch.parallel.mesh import axis_size, sum_over
from tpresearch.parallel.weights import local_part
from tpresearch.plan.compiler import Plan
from tpresearch.plan.sequence import rule_to_add
from tpresearch.train.observe import Observer
from tpresearch.train.state import TrainState

SAMPLES = 1024
"""Elements of each gradient that are compared."""

TOLERANCE = 0.05
"""Relative to the greatest element: what kernels that add in any order stay far below, and a partial gradient does not."""

STEPS = 5
"""Of a process, among which each gradient is to have one in which it is not zero: an output layer and layers before it that start
from zeros take three."""


class AgreedGradients(Observer):
    """Refuses a parameter without a rule that acts on a shard: each rank along the axes that shard layers has the gradient of
    its own shard, and its weights would drift apart. Each is compared in the first step of this process in which its
    gradient is not zero, as it is before a layer that starts from zeros. (The step that the ledger counts is left out.)
    """

    def __init__(self, cfg: Config, plan: Plan, mesh: DeviceMesh) -> None:
        self._cfg, self._plan, self._mesh = cfg, plan, mesh
        self._left = list(plan.replicated) if plan.rules else []
        self._steps = range(0)

    def start(self, state: TrainState) -> None:
        self._steps = range(state.step, state.step + STEPS)

    def gradients(self, state: TrainState) -> None:
        """Refuse, on every rank, a replicated parameter whose gradient differs between the ranks that share it."""
        counted = min(self._steps.start + 1, total_steps(self._cfg) - 1)
        if state.step in self._steps and state.step != counted:
            trained = state.trained_parameters()
            having = {n: g for n in self._left if n in trained and (g := trained[n].grad) is not None}
            if having:
                self._compare(having)

    @torch.no_grad()
    def _compare(self, having: dict[str, Tensor]) -> None:
        parts = [_sample(gradient) for gradient in having.values()]
        flat = torch.cat(parts).to(self._mesh.device_type)
        least, most = flat.clone(), flat
        for axis in LAYER_AXES:
            if axis_size(self._mesh, axis) > 1:
                dist.all_reduce(least, dist.ReduceOp.MIN, self._mesh.get_group(axis))
                dist.all_reduce(most, dist.ReduceOp.MAX, self._mesh.get_group(axis))
        sizes = [len(part) for part in parts]
        pairs = zip((most - least).split(sizes), torch.maximum(most, -least).split(sizes), strict=True)
        none = flat.new_zeros(2)
        seen = torch.stack(
            [torch.stack((d.max() - TOLERANCE * s.max(), s.max())) if len(d) else none for d, s in pairs]
        )
        dist.all_reduce(seen, dist.ReduceOp.MAX)  # all ranks end, or none
        apart, greatest = (dict(zip(having, column, strict=True)) for column in seen.T.tolist())
        if found := [name for name in having if apart[name] > 0]:
            raise self._refusal(max(found, key=self._last_call))
        self._left = [name for name in self._left if not greatest.get(name)]

    def _last_call(self, name: str) -> int:
        """When a parameter's module was last called: what differs there may be why what was called before it differs."""
        module = name.rpartition(".")[0]
        return max((at for at, called in enumerate(self._plan.probe.called) if called == module), default=-1)

    def _refusal(self, name: str) -> ConfigError:
        plan = self._cfg.parallel.tensor
        why = f"the gradient of {name} differs between tensor-parallel ranks that each hold all of it: "
        module = name.rpartition(".")[0]
        shapes = self._plan.probe.shapes.get(module)
        heads_apart = 4  # dims of [b, s, heads, d]
        if shapes and shapes.inputs and shapes.inputs[0] and len(shapes.inputs[0]) < heads_apart:
            why += "the output of its module meets a shard, and its gradient is partial"
            legal = (
                "a rule for its module with a style by which that is summed, as CopyToShards in docs/plans.md"
            )
            return ConfigError(f"model.plans.{plan}", plan, why, legal, fix={})
        why += "its module works on a shard, and its gradient is partial"
        legal = (
            "a rule for its module by which partial gradients are summed: style sequence, with the dim that is "
            "sharded there as src and dst, such as shard:2"
        )
        fix = rule_to_add(self._cfg, module, "shard:2")
        return ConfigError(f"model.plans.{plan}", plan, why, legal, fix)


def _sample(gradient: Tensor) -> Tensor:
    """Up to `SAMPLES` elements, evenly spaced, of what this rank holds, in at least float32."""
    flat = local_part(gradient).flatten()
    flat = flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES]
    return flat.to(torch.promote_types(flat.dtype, torch.float32))


class AgreedUse(Observer):
    """Refuses a backward in which data-parallel ranks have gradients of different parameters, since their rows led the forward
    elsewhere: `fully_shard` sums those that a rank has in their order, one parameter's with another's (torch 2.11 to 2.14).

    It makes the host wait for the device in each step, and is for models whose forward may depend on values or draws.
    """

    def __init__(self, cfg: Config, plan: Plan, mesh: DeviceMesh) -> None:
        self._cfg, self._plan, self._mesh = cfg, plan, mesh
        self._trained: dict[str, nn.Parameter] = {}
        self._marks: list[tuple[int, int] | None] = []
        self._used: list[list[bool]] = []
        """By backward, whether each parameter got a gradient."""

    def step(self, state: TrainState) -> AbstractContextManager[object]:
        self._trained = state.trained_parameters()
        self._marks, self._used = self._read(), []
        return nullcontext()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        yield
        if name == "backward":
            before, self._marks = self._marks, self._read()
            self._used.append([old != new for old, new in zip(before, self._marks, strict=True)])

    def _read(self) -> list[tuple[int, int] | None]:
        """What differs once a gradient was added: its place, and how often it was changed."""
        gradients = (parameter.grad for parameter in self._trained.values())
        return [None if g is None else (id(g), local_part(g)._version) for g in gradients]

    def gradients(self, state: TrainState) -> None:
        """Refuse, on every rank, a parameter that got its gradient in other backwards of the step on some of them."""
        used = torch.tensor(self._used, dtype=torch.int32, device=self._mesh.device_type)
        on_ranks = sum_over(self._mesh, used, DATA_AXES)
        apart = ((on_ranks > 0) & (on_ranks < self._plan.sizes.dp)).any(dim=0).tolist()
        for name, differs in zip(self._trained, apart, strict=True):
            if differs:
                why = f"{name} has a gradient on some ranks alone, whose rows led the forward to it: fully_shard would sum it with others"
                raise _led_apart(self._cfg, why, "uses every parameter")


Check = Callable[[Tensor, dist.ProcessGroup], None]


class AgreedUnits(Observer):
    """Refuses a forward that leads data-parallel ranks to different units of `fully_shard`, or to more of a unit's parameters on one than on
    another: it would gather or sum those of one rank with others of another, for which gloo ends the process where their sizes differ.

    As with `AgreedUse`, the host waits for the device. (The default collectives are private; read in torch 2.11 to 2.14.)
    """

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._uses: list[str] = []

    def start(self, state: TrainState) -> None:
        for name, unit in state.model.named_modules():
            if isinstance(unit, FSDPModule):
                what = name or "the model"
                gather: Any = _Checked(DefaultAllGather(), self._check_for(f"gather {what}"))
                scatter: Any = _Checked(DefaultReduceScatter(), self._check_for(f"sum gradients of {what}"))
                unit.set_custom_all_gather(gather)
                unit.set_custom_reduce_scatter(scatter)

    def _check_for(self, use: str) -> Check:
        """What compares, before this use of the group by this rank, that it is that of the others."""
        number = len(self._uses)
        self._uses.append(use)

        def check(tensor: Tensor, group: dist.ProcessGroup) -> None:
            size = tensor.numel()
            numbers = torch.tensor([number, -number, size, -size], device=tensor.device)
            dist.all_reduce(numbers, dist.ReduceOp.MAX, group)
            most, least, largest, smallest = numbers.tolist()
            if most != -least or largest != -smallest:
                why = f"some ranks, whose rows led the forward elsewhere, {self._uses[most]}, where others {self._uses[-least]}"
                if most == -least:
                    why = f"some ranks, whose rows led the forward to more parameters, {use} of {largest:,} numbers, where others do of {-smallest:,}"
                raise _led_apart(self._cfg, why, "comes to the same parameters")

        return check


def _led_apart(cfg: Config, why: str, does: str) -> ConfigError:
    legal = f"ddp, or a forward that {does} whatever the rows"
    return ConfigError("parallel", cfg.parallel.name, why, legal, fix={"parallel": "ddp"})


class _Checked:
    """A collective of `fully_shard`, which calls it by keyword, after a check."""

    def __init__(self, collective: DefaultAllGather | DefaultReduceScatter, check: Check) -> None:
        self._collective, self._check, self.allocate = collective, check, collective.allocate

    def __call__(self, **given: Any) -> Any:
        self._check(given["input_tensor"], given["group"])
        return self._collective(**given)
