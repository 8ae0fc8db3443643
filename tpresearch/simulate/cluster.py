"""A cluster as numbers, each with its source: the parameters of the cost model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tpresearch.config.errors import ConfigError, nearest
from tpresearch.config.schema import Dtype


class Kind(StrEnum):
    """Kind of source of a number, the least certain first."""

    guessed = "guessed"
    fitted = "fitted"
    published = "published"
    datasheet = "datasheet"
    measured = "measured"


@dataclass(frozen=True)
class Number:
    """One number of a cluster."""

    value: float | tuple[float, ...]
    kind: Kind
    source: str


NUMBERS = {
    "memory_gb": "memory of a device, in 1e9 bytes",
    "memory_reserved_gb": "of it, what CUDA, NCCL and the allocator take beside a job's tensors",
    "peak_tflops_bfloat16": "dense matmul peak of a device in 1e12 FLOP/s, 0 where it has none",
    "peak_tflops_float32": "the same in float32, without TF32",
    "peak_tflops_float64": "the same in float64",
    "compute_units": "units that each take one tile of a matmul at a time: SMs of a GPU",
    "gemm_efficiency": "share of the peak that a large matmul reaches in a training step",
    "gemm_half_depth": "length of the inner dim at which a matmul has half of its best rate",
    "bandwidth_gb_s": "memory bandwidth of a device in 1e9 bytes/s",
    "bandwidth_efficiency": "share of it that an elementwise kernel reaches",
    "optimizer_efficiency": "share of it that the fused optimizer reaches",
    "copy_efficiency": "share of it that FSDP's copies of gathered weights and of gradients reach",
    "attention_tflops_forward": "rate of causal attention, head width 128, by length 512, 1024, ... 16384, or from 128",
    "attention_tflops_backward": "the same for its backward",
    "attention_narrow_heads": "factor on those rates for each halving of the head width below 128",
    "kernel_us": "least time of a kernel on the device",
    "launch_us": "host time per op",
    "collective_host_us": "host time per collective of FSDP, hooks and all",
    "tensor_host_us": "host time per collective of a sharding rule, with DTensor's dispatch of the ops around it",
    "intra_gb_s": "bus bandwidth of a collective over all devices of a host, per device",
    "intra_step_us": "time per step of a ring within a host",
    "inter_gb_s": "bandwidth between hosts, per device",
    "inter_efficiency": "share of it that a collective reaches",
    "inter_step_us": "time per step of a ring that leaves a host",
    "collective_us": "least time of a collective",
    "overlap_slowdown": "share by which kernels are slower while a collective runs beside them, on a CPU on its core",
    "scale_slowdown": "share by which a step is slower for each doubling of hosts; on a CPU, of several ranks' own work",
}
"""Every number that a cluster has to state: what it means, with its unit."""


@dataclass(frozen=True)
class Cluster:
    """Hosts of the same kind, connected."""

    name: str
    device: str
    devices_per_host: int
    hosts: int | None
    """None if unlimited."""
    shared_cores: int | None
    """Cores that the ranks of a host share, if devices are processes on one CPU; None for separate devices."""
    has_switch: bool
    """Whether a host's devices are connected by a switch; if not, pairwise, so that a group of few devices uses few links."""
    numbers: Mapping[str, Number]
    checked: tuple[str, ...]
    """On which measurements predictions for this cluster were checked, with what error."""

    def __getitem__(self, name: str) -> float:
        value = self.numbers[name].value
        assert isinstance(value, float)
        return value

    def table(self, name: str) -> tuple[float, ...]:
        value = self.numbers[name].value
        return value if isinstance(value, tuple) else (value,)

    def peak_flops(self, dtype: Dtype) -> float:
        return self[f"peak_tflops_{dtype}"] * 1e12

    @property
    def is_host(self) -> bool:
        """Whether the device is the host's own CPU: nothing overlaps."""
        return self.shared_cores is not None

    def hosts_of(self, world: int) -> int:
        return -(-world // self.devices_per_host)

    def assumptions(self) -> Iterator[tuple[str, Number]]:
        """Its numbers, the least certain first."""
        order = list(Kind)
        yield from sorted(self.numbers.items(), key=lambda item: order.index(item[1].kind))


def cluster_of(plain: Mapping[str, Any]) -> Cluster:
    """A cluster from its YAML.

    Raises:
        ConfigError: for a number that is missing, has no source or kind, or is none.
    """
    if not plain:
        why = "prices need a cluster"
        raise ConfigError("cluster", None, why, "an option of conf/cluster, such as cluster=h100_dgx")
    for name in ("name", "device", "devices_per_host", "numbers"):
        if plain.get(name) is None:
            raise ConfigError(
                f"cluster.{name}", None, "a cluster needs it", "a value, in its conf/cluster file"
            )
    has_switch = plain.get("has_switch", True)
    if not isinstance(has_switch, bool):
        why = "whether a host's devices are joined by a switch is a yes or no"
        raise ConfigError("cluster.has_switch", has_switch, why, "true or false")
    given = plain["numbers"]
    for name in given:
        if name not in NUMBERS:
            why, legal = "no such number", "one of " + ", ".join(nearest(name, NUMBERS))
            raise ConfigError(f"cluster.numbers.{name}", given[name], why, legal)
    numbers = {name: _number(name, given.get(name), about) for name, about in NUMBERS.items()}
    return Cluster(
        name=str(plain["name"]),
        device=str(plain["device"]),
        devices_per_host=int(plain["devices_per_host"]),
        hosts=plain.get("hosts"),
        shared_cores=plain.get("shared_cores"),
        has_switch=has_switch,
        numbers=numbers,
        checked=tuple(plain.get("checked") or ()),
    )


def check_world(cluster: Cluster, world: int) -> None:
    """Refuse more ranks than there are devices, and a last host that is only partly used.

    Raises:
        ConfigError: naming world_size.
    """
    per_host = cluster.devices_per_host
    if cluster.hosts is not None and world > cluster.hosts * per_host:
        most = cluster.hosts * per_host
        why = f"cluster {cluster.name} has {most} devices on {cluster.hosts} hosts"
        raise ConfigError("world_size", world, why, f"at most {most}", fix={"world_size": most})
    if world > per_host and world % per_host:
        below = world // per_host * per_host
        why = (
            f"hosts of cluster {cluster.name} have {per_host} devices each, and the last would be partly used"
        )
        raise ConfigError("world_size", world, why, f"a multiple of {per_host}", fix={"world_size": below})


def _number(name: str, plain: Any, about: str) -> Number:
    key, legal = f"cluster.numbers.{name}", "{value: ..., kind: " + "|".join(Kind) + ", source: ...}"
    if plain is None:
        raise ConfigError(key, None, f"not stated: {about}", legal)
    if not isinstance(plain, Mapping) or not {"value", "kind", "source"} <= plain.keys():
        raise ConfigError(key, plain, f"has no value, kind and source: {about}", legal)
    if plain["kind"] not in list(Kind):
        raise ConfigError(f"{key}.kind", plain["kind"], "no such kind of number", " ".join(Kind))
    value = plain["value"]
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(v, bool) or not isinstance(v, int | float) or v < 0 for v in values):
        raise ConfigError(f"{key}.value", value, f"not a number of 0 or more: {about}", "a number")
    found = tuple(map(float, values)) if isinstance(value, list) else float(value)
    return Number(found, Kind(plain["kind"]), str(plain["source"]))
