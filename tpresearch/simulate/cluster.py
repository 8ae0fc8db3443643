"""A cluster as numbers, each with its source: the parameters of the cost model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tpresearch.config.errors import ConfigError
from tpresearch.config.near_names import nearest
from tpresearch.config.schema import Dtype
from tpresearch.config.values import Within, check_value


class SourceKind(StrEnum):
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
    kind: SourceKind
    source: str


LEAST, MOST = 1e-12, 1e9
"""Far below and above any device, a processor by the peak of a GPU too: a number beyond them is in another unit, such as
bytes/s for 1e9 bytes/s, or makes times overflow."""
POSITIVE = Within(LEAST, MOST)
PEAK = Within(LEAST, MOST, or_zero=True)
NON_NEGATIVE = Within(0, MOST)
MEMORY = Within(LEAST, 10_000)
"""A device's: in MiB it is a number above."""
SHARE_OF_PEAK = Within(LEAST, 1)
SHARE_OF_RATE = Within(LEAST, 10)
"""Above 1 on a CPU, where caches make an op faster than the rate that it is relative to."""

NUMBERS = {
    "memory_gb": (MEMORY, "memory of a device, in 1e9 bytes"),
    "memory_reserved_gb": (
        NON_NEGATIVE,
        "of it, what CUDA, NCCL and the allocator take beside a job's tensors",
    ),
    "peak_tflops_bfloat16": (PEAK, "dense matmul peak of a device in 1e12 FLOP/s, 0 where it has none"),
    "peak_tflops_float32": (PEAK, "the same in float32, without TF32"),
    "peak_tflops_float64": (PEAK, "the same in float64"),
    "peak_tflops_float8": (PEAK, "the same in float8, 0 where it has none"),
    "compute_units": (Within(1), "units that each take one tile of a matmul at a time: SMs of a GPU"),
    "gemm_efficiency": (SHARE_OF_PEAK, "share of the peak that a large matmul reaches in a training step"),
    "gemm_half_depth": (NON_NEGATIVE, "length of the inner dim at which a matmul has half of its best rate"),
    "bandwidth_gb_s": (POSITIVE, "memory bandwidth of a device in 1e9 bytes/s"),
    "bandwidth_efficiency": (SHARE_OF_PEAK, "share of it that an elementwise kernel reaches"),
    "optimizer_efficiency": (SHARE_OF_RATE, "share of it that the fused optimizer reaches in float32"),
    "copy_efficiency": (
        SHARE_OF_RATE,
        "share of it that FSDP's copies of gathered weights and of gradients reach",
    ),
    "attention_tflops_forward": (
        POSITIVE,
        "rate of causal attention in bfloat16, head width 128, at lengths 512, 1024, ... 16384, or from 128; that of a wider "
        "dtype is in proportion to its peak",
    ),
    "attention_tflops_backward": (POSITIVE, "the same for its backward"),
    "attention_narrow_heads": (
        SHARE_OF_PEAK,
        "factor on those rates for each halving of the head width below 128",
    ),
    "kernel_us": (NON_NEGATIVE, "least time of a kernel on the device"),
    "launch_us": (NON_NEGATIVE, "host time per op"),
    "collective_host_us": (NON_NEGATIVE, "host time per collective of FSDP, hooks and all"),
    "tensor_host_us": (
        NON_NEGATIVE,
        "host time per collective of a sharding rule, with DTensor's dispatch of the ops around it",
    ),
    "intra_gb_s": (POSITIVE, "bus bandwidth of a collective over all devices of a host, per device"),
    "intra_step_us": (
        NON_NEGATIVE,
        "time per step of a ring within a host; on a CPU, of a core, also where the ring leaves the host",
    ),
    "inter_gb_s": (POSITIVE, "bandwidth between hosts, per device"),
    "inter_efficiency": (SHARE_OF_PEAK, "share of it that a collective reaches"),
    "inter_step_us": (NON_NEGATIVE, "time per step of a ring that leaves a host"),
    "collective_us": (NON_NEGATIVE, "least time of a collective"),
    "overlap_slowdown": (
        NON_NEGATIVE,
        "share by which kernels are slower while a collective runs beside them, on a CPU on its core",
    ),
    "scale_slowdown": (
        NON_NEGATIVE,
        "share by which a step is slower for each doubling of hosts; on a CPU, of several ranks' own work",
    ),
}
"""Every number that a cluster has to state: what it may be, and what it means, with its unit."""
OPTIONAL_NUMBERS = {"peak_tflops_float8": Number(0.0, SourceKind.guessed, "not stated: no matmuls in float8")}
"""Numbers that a cluster may leave out, with their defaults."""
TABLES = ("attention_tflops_forward", "attention_tflops_backward")
"""Numbers that are lists, by `LENGTHS` or all but its first two."""
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TABLE_SIZES = (len(LENGTHS) - 2, len(LENGTHS))

CLUSTER_KEYS = {
    "name": str,
    "device": str,
    "devices_per_host": int,
    "devices_per_node": int | None,
    "hosts": int | None,
    "shared_cores": float | None,
    "has_switch": bool,
    "checked": list[str],
    "numbers": dict,
}
"""The other keys of a cluster, and their types."""
COUNTS = ("devices_per_host", "devices_per_node", "hosts", "shared_cores")
DEFAULTS = {"devices_per_node": None, "hosts": None, "shared_cores": None, "has_switch": True, "checked": []}
"""Those that a cluster may leave out."""


@dataclass(frozen=True)
class Cluster:
    """Hosts of the same kind, connected."""

    name: str
    device: str
    devices_per_host: int
    devices_per_node: int
    """Devices whose ranks one torchrun starts: those of a host, but of a rack those of a tray."""
    hosts: int | None
    """None if unlimited."""
    shared_cores: float | None
    """Cores that the ranks of a host share, if devices are processes on one CPU; None for separate devices."""
    has_switch: bool
    """Whether a host's devices are connected by a switch; if not, pairwise, so that a group of few devices uses few links."""
    numbers: Mapping[str, Number]
    checked: tuple[str, ...]
    """Measurements that predictions for this cluster were checked against, with the errors."""

    def __getitem__(self, name: str) -> float:
        value = self.numbers[name].value
        assert isinstance(value, float)
        return value

    def table(self, name: str) -> tuple[float, ...]:
        value = self.numbers[name].value
        assert isinstance(value, tuple)
        return value

    def peak_flops(self, dtype: Dtype) -> float:
        return self[f"peak_tflops_{dtype}"] * 1e12

    @property
    def is_cpu(self) -> bool:
        """Whether the device is the host's own CPU: nothing overlaps."""
        return self.shared_cores is not None

    def hosts_of(self, world: int) -> int:
        return -(-world // self.devices_per_host)

    def nodes_of(self, world: int) -> int:
        """The fewest nodes of torchrun with as many ranks each."""
        return next(
            nodes
            for nodes in range(1, world + 1)
            if world % nodes == 0 and world <= nodes * self.devices_per_node
        )

    def assumptions(self) -> Iterator[tuple[str, Number]]:
        """The numbers that it states, the least certain first."""
        order = list(SourceKind)
        stated = [
            (name, number)
            for name, number in self.numbers.items()
            if number is not OPTIONAL_NUMBERS.get(name)
        ]
        yield from sorted(stated, key=lambda item: order.index(item[1].kind))


def parse_cluster(plain: Mapping[str, Any]) -> Cluster:
    """A cluster from its YAML.

    Raises:
        ConfigError: for a number that is missing, has no source or kind, or is not a number, and for an unknown key.
    """
    if not plain:
        why = "prices need a cluster"
        raise ConfigError("cluster", None, why, "an option of conf/cluster, such as cluster=h100_dgx")
    stated = _stated(plain)
    numbers, checked = _numbers(stated.pop("numbers")), tuple(stated.pop("checked"))
    cluster = Cluster(**stated, numbers=numbers, checked=checked)
    if (reserved := cluster["memory_reserved_gb"]) >= (memory := cluster["memory_gb"]):
        key, other = "cluster.numbers.memory_reserved_gb.value", "cluster.numbers.memory_gb.value"
        why, fix = f"it leaves nothing of {other}={memory:g}", {key: None, other: None}
        raise ConfigError(key, f"{reserved:g}", why, "less than that", fix=fix)
    return cluster


def _stated(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Its values by key, each checked but for the numbers, and those that it leaves to their defaults."""
    for name, value in plain.items():
        if name not in CLUSTER_KEYS:
            why, legal = "a cluster has no such key", "one of " + ", ".join(nearest(str(name), CLUSTER_KEYS))
            raise ConfigError(f"cluster.{name}", value, why, legal)
    for name in CLUSTER_KEYS:
        if name not in DEFAULTS and plain.get(name) in (None, "", {}):
            why, legal = "a cluster needs it", "a value, in its conf/cluster file"
            raise ConfigError(f"cluster.{name}", plain.get(name), why, legal)
    stated: dict[str, Any] = {**DEFAULTS, **plain}
    stated["checked"] = stated["checked"] or []
    for name, kind in CLUSTER_KEYS.items():
        check_value(f"cluster.{name}", stated[name], kind)
        if name in COUNTS and stated[name] is not None:
            least = Within(LEAST) if name == "shared_cores" else Within(1)
            if stated[name] not in least:
                raise ConfigError(f"cluster.{name}", stated[name], "out of bounds", str(least))
    per_host = stated["devices_per_host"]
    stated["devices_per_node"] = per_node = stated["devices_per_node"] or per_host
    if per_host % per_node:
        why = f"does not divide cluster.devices_per_host={per_host}"
        raise ConfigError("cluster.devices_per_node", per_node, why, "a divisor, or null for a whole host")
    return stated


def _numbers(given: Mapping[str, Any]) -> dict[str, Number]:
    for name in given:
        if name not in NUMBERS:
            why, legal = "no such number", "one of " + ", ".join(nearest(str(name), NUMBERS))
            raise ConfigError(f"cluster.numbers.{name}", given[name], why, legal)
    left_out = OPTIONAL_NUMBERS.keys() - given.keys()
    return {
        name: OPTIONAL_NUMBERS[name] if name in left_out else _number(name, given.get(name))
        for name in NUMBERS
    }


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


def _number(name: str, plain: Any) -> Number:
    bound, about = NUMBERS[name]
    key, legal = f"cluster.numbers.{name}", "{value: ..., kind: " + "|".join(SourceKind) + ", source: ...}"
    if plain is None:
        raise ConfigError(key, None, f"not stated: {about}", legal)
    if not isinstance(plain, Mapping) or plain.keys() != {"value", "kind", "source"}:
        why = f"not a value with its kind and its source: {about}"
        fix = {key: None, f"{key}.value": plain} if isinstance(plain, int | float) else None
        raise ConfigError(key, plain, why, legal, fix=fix)
    if plain["kind"] not in list(SourceKind):
        raise ConfigError(f"{key}.kind", plain["kind"], "no such kind of number", " ".join(SourceKind))
    if not isinstance(plain["source"], str) or not plain["source"]:
        raise ConfigError(f"{key}.source", plain["source"], "it says nothing", "where the number comes from")
    value = plain["value"]
    values = value if isinstance(value, list) and name in TABLES else [value]
    numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v in bound]
    sizes = TABLE_SIZES if name in TABLES else (1,)
    if len(numbers) != len(values) or len(values) not in sizes:
        legal = f"a list of {' or '.join(map(str, sizes))}, each {bound}" if name in TABLES else str(bound)
        raise ConfigError(f"{key}.value", value, f"not such a number: {about}", legal)
    found = tuple(map(float, numbers)) if name in TABLES else float(numbers[0])
    return Number(found, SourceKind(plain["kind"]), plain["source"])
