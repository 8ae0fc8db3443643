"""The configs that a number of GPUs leaves open: plan, mesh, checkpointing, rows per micro-batch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass

from tpresearch.config import Config
from tpresearch.config.axes import REPLICATE, SHARD, MeshSizes
from tpresearch.config.errors import ConfigError, format_value
from tpresearch.config.mesh import check_declared_counts
from tpresearch.config.schema import Checkpointing, DataPlan, MeshConfig, ParallelConfig, TensorPlan
from tpresearch.config.validate import validate
from tpresearch.simulate.cluster import Cluster

PLANS: dict[str, tuple[TensorPlan | None, DataPlan]] = {
    "none": (None, DataPlan.none),
    "ddp": (None, DataPlan.ddp),
    "fsdp": (None, DataPlan.fsdp),
    "hsdp": (None, DataPlan.hsdp),
    "sp": (TensorPlan.sp, DataPlan.none),
    "fsdp_tp": (TensorPlan.sp, DataPlan.fsdp),
    "hsdp_tp": (TensorPlan.sp, DataPlan.hsdp),
}
"""Options of conf/parallel. `tp` moves the same bytes as `sp` and holds more, so it is tried only where `sp` cannot be used."""

REPLICA_GROWTH = 8
"""Each next larger replica of a model has this many times more hosts."""


@dataclass(frozen=True)
class Candidate:
    """One way to train the model on these GPUs."""

    cfg: Config
    sizes: MeshSizes

    @property
    def overrides(self) -> str:
        """The overrides that select it on the command line."""
        parallel, train = self.cfg.parallel, self.cfg.train
        mesh = [f"mesh.{axis}={size}" for axis, size in self.sizes.nontrivial().items()]
        if parallel.name in PLANS and parallel.tensor is not PLANS[parallel.name][0]:
            mesh.append(f"parallel.tensor={parallel.tensor}")
        checkpointing = f"parallel.activation_checkpointing={parallel.activation_checkpointing}"
        micro = f"train.micro_batch_size={train.micro_batch_size}"
        return " ".join([f"parallel={parallel.name}", *mesh, checkpointing, micro])

    def with_micro_batch(self, rows: int) -> Candidate:
        return Candidate(
            dataclasses.replace(self.cfg, train=dataclasses.replace(self.cfg.train, micro_batch_size=rows)),
            self.sizes,
        )


@dataclass(frozen=True)
class Rejected:
    """A candidate that is not simulated, and why: not a valid config, or certain not to fit."""

    overrides: str
    why: str
    is_valid: bool = False
    error: ConfigError | None = None
    """With which its step ends, where that is what it is not simulated for."""


def candidate_plans(cfg: Config, gpus: int, cluster: Cluster) -> Iterator[Candidate | Rejected]:
    """Every plan, mesh and checkpointing, each with one row per micro-batch.

    Tensor parallelism stays within a host, as Megatron-LM found that it should (arXiv 2104.04473, section 3.2); replicas are
    of one host, 8, 64 and so on.
    """
    for name, (tensor, data) in PLANS.items():
        for mesh in _meshes(tensor, data, gpus, cluster):
            for checkpointing in (Checkpointing.none, Checkpointing.selective, Checkpointing.full):
                parallel = dataclasses.replace(
                    cfg.parallel,
                    name=name,
                    tensor=tensor and _tensor_plan(cfg, mesh),
                    data=data,
                    activation_checkpointing=checkpointing,
                )
                if parallel.tensor is TensorPlan.tp and name == "sp":
                    parallel.name = "tp"
                yield _validated(cfg, parallel, mesh, gpus, cluster)


def _tensor_plan(cfg: Config, mesh: MeshConfig) -> TensorPlan:
    """`tp` where the model has no rules for `sp`, or the sequence cannot be sharded evenly."""
    is_sharded = TensorPlan.sp in cfg.model.plans and cfg.data.seq_len % (mesh.tp or 1) == 0
    return TensorPlan.sp if is_sharded else TensorPlan.tp


def micro_batch_rows(candidate: Candidate) -> list[int]:
    """Divisors of a rank's share of the global batch, each at least a third larger than the one before, since speed hardly
    differs between closer ones; at least two micro-batches, where matmuls add up gradients.
    """
    cfg, found = candidate.cfg, [1]
    share = cfg.train.global_batch_size // candidate.sizes.dp
    most = share // 2 if cfg.parallel.gradient_accumulation_fusion else share
    for rows in _divisors(share):
        if 4 * found[-1] <= 3 * rows <= 3 * most:
            found.append(rows)
    return found


def _divisors(number: int) -> list[int]:
    small = [divisor for divisor in range(1, math.isqrt(number) + 1) if number % divisor == 0]
    return sorted({*small, *(number // divisor for divisor in small)})


def _meshes(tensor: TensorPlan | None, data: DataPlan, gpus: int, cluster: Cluster) -> Iterator[MeshConfig]:
    host = min(gpus, cluster.devices_per_host)
    for tp in _divisors(host)[1:] if tensor else [1]:
        ranks = gpus // tp
        if (data is DataPlan.none) != (ranks == 1):
            continue
        mesh = MeshConfig(tp=tp if tensor else None)
        if data is not DataPlan.hsdp:
            yield mesh
            continue
        shards = max(1, cluster.devices_per_host // tp)
        while 2 * shards <= ranks:
            if shards > 1 and ranks % shards == 0:
                sizes = {SHARD.name: shards, REPLICATE.name: ranks // shards}
                yield dataclasses.replace(mesh, **sizes)
            shards *= REPLICA_GROWTH


def _validated(
    cfg: Config, parallel: ParallelConfig, mesh: MeshConfig, gpus: int, cluster: Cluster
) -> Candidate | Rejected:
    train = dataclasses.replace(cfg.train, micro_batch_size=1)
    found = dataclasses.replace(cfg, parallel=parallel, mesh=mesh, train=train)
    try:
        sizes = validate(found, gpus, cluster.hosts_of(gpus))
        check_declared_counts(found, sizes)
        return Candidate(found, sizes)
    except ConfigError as error:
        size = "" if mesh.tp is None else f" mesh.tp={mesh.tp}"
        overrides = f"parallel={parallel.name}{size} parallel.activation_checkpointing={parallel.activation_checkpointing}"
        return Rejected(overrides, f"{error.field}={format_value(error.value)}: {error.why}")
