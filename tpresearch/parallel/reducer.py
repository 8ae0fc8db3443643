"""Gradients summed over replicas during backward, as in DDP (arXiv 2006.15704, section 3.2).

For meshes on which nothing is sharded over data: `fully_shard` over one shard copies each weight before it is used, and
each gradient twice more than this.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from tpresearch.config.axes import REPLICATE
from tpresearch.config.schema import Config
from tpresearch.config.validate import uses_fully_shard
from tpresearch.parallel.apply import in_several_parts, reduce_dtype
from tpresearch.parallel.weights import local_part
from tpresearch.plan.compiler import Plan


class GradientBucket:
    """A bucket of gradients that are summed in one all-reduce, started when the last one is ready.

    A replica without one of the gradients, since its rows led a forward elsewhere, adds zeros: negative ones, which in a sum
    remain only where every replica has added them, and then there is none.

    Args:
        trained: the parameters that have the gradients, by the names of the model's parameters. dtype: in which they are summed; None
            for their own.
        may_branch: whether one may have a gradient on some replicas alone, for which the host waits for the sum.
    """

    def __init__(
        self,
        trained: dict[str, nn.Parameter],
        group: dist.ProcessGroup,
        dtype: torch.dtype | None,
        may_branch: bool,
    ) -> None:
        self._trained, self._names = [*trained.values()], frozenset(trained)
        self._group, self._dtype, self._may_branch = group, dtype, may_branch
        self._shapes = [local_part(parameter).shape for parameter in self._trained]
        self._lacking: set[nn.Parameter] = set()
        self._sum: tuple[Tensor, dist.Work] | None = None
        self.pending = set(self._names)
        """Those whose gradients are not ready yet."""

    def start_all_reduce(self) -> None:
        """Move the gradients into the one tensor that is summed."""
        self._lacking = {parameter for parameter in self._trained if parameter.grad is None}
        parts = [_own_part(parameter).flatten() for parameter in self._trained]
        flat = (torch.cat(parts) if len(parts) > 1 else parts[0]).to(self._dtype or parts[0].dtype)
        for parameter in self._trained:
            parameter.grad = None
        work = dist.all_reduce(flat, group=self._group, async_op=True)
        assert work is not None
        self._sum = flat, work

    def finish(self) -> None:
        """Wait for the sum."""
        assert self._sum
        flat, work = self._sum
        work.wait()
        parts = flat.split([shape.numel() for shape in self._shapes])
        for parameter, shape, part in zip(self._trained, self._shapes, parts, strict=True):
            if parameter not in self._lacking or (self._may_branch and not is_no_gradient(part)):
                parameter.grad = _as_gradient_of(parameter, part.view(shape).to(parameter.dtype))
        self.forget()

    def forget(self) -> None:
        """Begin anew, whatever has been started."""
        self._sum, self.pending = None, set(self._names)


def is_no_gradient(part: Tensor) -> bool:
    """Whether this is a sum of the zeros that replicas without a gradient add."""
    return bool(((part == 0) & part.signbit()).all())


def match_placements(gradient: Tensor, parameter: Tensor) -> Tensor:
    """A gradient with its parameter's placements: rules leave some partial over their axis, or replicated."""
    if not isinstance(gradient, DTensor) or not isinstance(parameter, DTensor):
        return gradient
    if gradient.placements == parameter.placements:
        return gradient
    return gradient.redistribute(placements=parameter.placements)


def _own_part(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a parameter's gradient; zeros if it has none."""
    if parameter.grad is None:
        return torch.full_like(local_part(parameter), -0.0)
    return local_part(match_placements(parameter.grad, parameter))


def _as_gradient_of(parameter: nn.Parameter, part: Tensor) -> Tensor:
    """The parameter's gradient, of which a rank has this part."""
    if not isinstance(parameter, DTensor):
        return part
    shape, stride = parameter.shape, parameter.stride()
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=stride)


class GradientReducer:
    """Sums all gradients of a model over its replicas, a bucket at a time.

    Args:
        trained: by the name of each of the model's parameters, the one that has its gradient: its master, or itself.
        bucket_of: by the name of a parameter, that of the bucket which has its gradient.
        dtype, may_branch: see `GradientBucket`.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Mapping[str, nn.Parameter],
        bucket_of: Callable[[str], str | None],
        group: dist.ProcessGroup,
        dtype: torch.dtype | None,
        may_branch: bool,
    ) -> None:
        self.is_last_backward = True
        """Whether the next backward is the last one before the sum."""
        members: dict[str | None, dict[str, nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                members.setdefault(bucket_of(name), {})[name] = parameter
        self._buckets: list[GradientBucket] = []
        """In the order in which they are summed, which is the same on every replica whatever its rows lead to: backward comes to
        a unit before it comes to those registered earlier."""
        self._started = 0
        for of_bucket in reversed(members.values()):
            bucket = GradientBucket({name: trained[name] for name in of_bucket}, group, dtype, may_branch)
            self._buckets.append(bucket)
            for name, parameter in of_bucket.items():  # after the hook of MasterWeights, if there is one
                parameter.register_post_accumulate_grad_hook(
                    functools.partial(self._on_gradient, bucket, name)
                )

    def _on_gradient(self, bucket: GradientBucket, name: str, _: Tensor) -> None:
        if self.is_last_backward:
            if name not in bucket.pending:
                raise in_several_parts(name)
            bucket.pending.remove(name)
            while self._started < len(self._buckets) and not self._buckets[self._started].pending:
                self._start_next()

    def _start_next(self) -> None:
        self._buckets[self._started].start_all_reduce()
        self._started += 1

    @torch.no_grad()
    def finish(self) -> None:
        """Wait until every gradient is the sum over replicas."""
        while self._started < len(self._buckets):
            self._start_next()
        for bucket in self._buckets:
            bucket.finish()
        self._started = 0

    def forget(self) -> None:
        """Drop the sums of a backward that is not finished; the next would take them for its own."""
        for bucket in self._buckets:
            bucket.forget()
        self._started = 0


def build_reducer(
    model: nn.Module, trained: Mapping[str, nn.Parameter], plan: Plan, cfg: Config, mesh: DeviceMesh
) -> GradientReducer | None:
    """The reducer of a model that has its weights, with a bucket per block, embedding and output layer; None where there
    are no replicas, or `fully_shard` sums.

    Args:
        trained: see `GradientReducer`.
    """
    if plan.sizes.dp == 1 or uses_fully_shard(cfg.parallel, plan.sizes):
        return None
    group = mesh.get_group(REPLICATE.name)
    dtype = reduce_dtype(cfg.parallel.fsdp, cfg.train.dtype)
    return GradientReducer(model, trained, plan.unit_of, group, dtype, plan.probe.may_branch)
