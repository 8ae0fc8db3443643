"""Schedules kernels on streams as FSDP2 and NCCL do; what overlaps and what is exposed follows from the schedule.

On a GPU the host launches ahead of the device; each process group has a stream of its own. Of FSDP (torch/distributed/fsdp/
_fully_shard): a gather begins once the one before it was copied out, a copy-out waits for its gather, gradients are copied
in once the last reduce-scatter is done, and the end of backward waits for all of them. On a CPU nothing runs beside
anything else but the sums of gradients over replicas, and ranks share its cores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from tpresearch.ledger.entries import Entry, Event
from tpresearch.simulate.cluster import Cluster
from tpresearch.simulate.kernels import Kernel
from tpresearch.simulate.network import sent_s
from tpresearch.simulate.trace import of_fewer

HOST_TIME = {"fsdp": "collective_host_us", "dtensor": "tensor_host_us"}
"""Host time of a collective, by its issuer."""


class Span(NamedTuple):
    """One kernel or collective on the timeline."""

    stream: str
    name: str
    start_s: float
    seconds: float


@dataclass
class Streams:
    """The clocks of rank 0."""

    cluster: Cluster
    compiled: bool = False
    """Whether blocks are: their collectives are issued by compiled code, without DTensor's dispatch."""
    in_chunks: bool = False
    """Whether a rule's gathers and scatters are split into pieces that overlap with the matmul that consumes or produces them (async TP)."""
    slowdown: float = 1.0
    """Ranks that share each core of a CPU."""
    network_s: float = 0.0
    """Time of sending between hosts, for ranks on CPUs that wait for it."""
    beside_network_s: float = 0.0
    """The same of pending collectives."""
    host_s: float = 0.0
    device_s: float = 0.0
    groups: dict[str, float] = field(default_factory=dict)
    """axis -> when its last collective is done."""
    copy_engine_axes: set[str] = field(default_factory=set)
    """Axes whose pieces use copy engines, which do not slow concurrent kernels."""
    copied_out_s: float = 0.0
    reduced_s: float = 0.0
    """When the last reduce-scatter is done."""
    pending: dict[int, tuple[float, Event]] = field(default_factory=dict)
    """Storage -> when the collective that fills it is done, and that collective."""
    pending_reduce_scatter: Event | None = None
    chunked_gather: tuple[float, Event, int] | None = None
    """A gather in chunks: when its last chunk is done, its event and its number of ranks."""
    last_matmul_s: float = 0.0
    """Time of the last matmul, if nothing else was launched since."""
    pending_all_reduce: tuple[float, Event] | None = None
    """When the last sum over replicas is done."""
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Busy time by kind, and of collectives `sent/...` and `exposed/...`, by their `collective_key`."""
    spans: list[Span] | None = None

    def run(self, part: Sequence[Kernel]) -> None:
        self.copied_out_s = max(self.copied_out_s, self.device_s)  # a root's forward holds its streams back
        for kernel in part:
            if self.cluster.is_cpu and kernel.kind == "collective":
                self._run_collective_on_cpu(kernel)
            elif self.cluster.is_cpu:
                self._run_on_cpu(kernel)
            elif kernel.kind == "collective":
                self._run_collective(kernel)
            elif kernel.kind == "wait":
                self._wait_for_storage(kernel.op.reads[0][0])
            else:
                self._launch(kernel)
        if part:
            self._finish()

    def _run_on_cpu(self, kernel: Kernel) -> None:
        host_s = 0.0 if kernel.kind == "wait" else self.cluster["launch_us"] * 1e-6
        seconds = kernel.seconds * self.slowdown + host_s * self.slowdown
        self._record(kernel, "cpu", self.device_s, seconds)
        self.device_s += seconds

    def _run_collective_on_cpu(self, kernel: Kernel) -> None:
        event = kernel.op.event
        assert event
        # What it leaves of its core other ranks take.
        slower = self.slowdown * self.cluster["overlap_slowdown"]
        work, network = kernel.seconds - kernel.network_s, kernel.network_s
        alone_s = sent_s(work * max(1.0, slower), network)
        if event.collective == "reduce_scatter":
            self.pending_reduce_scatter = event
        seconds = alone_s
        if self._goes_on_beside(event):
            free = max(self.device_s, self.pending_all_reduce[0] if self.pending_all_reduce else 0.0)
            self.pending_all_reduce, seconds = (free + alone_s, event), work * slower
            self.beside_network_s += network
        else:
            self.network_s += network
        hidden_s = alone_s - seconds
        seconds += self.cluster[self._host_time(event)] * 1e-6 * self.slowdown
        self._record(kernel, "cpu", self.device_s, seconds)
        self.seconds[f"sent/{collective_key(event)}"] += hidden_s  # or waited for at the end
        self.seconds[f"exposed/{collective_key(event)}"] += seconds
        self.device_s += seconds

    def _goes_on_beside(self, event: Event) -> bool:
        """Whether gloo's threads sum gradients while backward goes on: those of `parallel.reducer`. FSDP waits for its own, which follow
        a reduce-scatter."""
        return event.issuer == "fsdp" and event.collective == "all_reduce" and not self.pending_reduce_scatter

    def _launch(self, kernel: Kernel) -> None:
        copies = kernel.kind == "copy"
        self.host_s += self.cluster["collective_host_us" if copies else "launch_us"] * 1e-6
        if kernel.name == "split_with_sizes_copy":
            self._wait_for_storage(kernel.op.reads[0][0])
        elif kernel.name == "chunk_cat" and self.pending_reduce_scatter:
            self._wait(self.reduced_s, self.pending_reduce_scatter)
        start = max(self.device_s, self.host_s)
        self.seconds["waiting for the host"] += start - self.device_s
        seconds = kernel.seconds
        busy_until = max(
            (at for axis, at in self.groups.items() if axis not in self.copy_engine_axes), default=0.0
        )
        if busy_until > start and not copies:
            beside = min(1.0, (busy_until - start) / seconds) if seconds else 0.0
            seconds *= 1 + self.cluster["overlap_slowdown"] * beside
        self._record(kernel, "device", start, seconds)
        self.device_s = start + seconds
        self.last_matmul_s = seconds if kernel.kind == "gemm" else 0.0
        if kernel.kind == "gemm" and self.chunked_gather:  # its last chunk of rows waits for the last piece
            done, event, ranks = self.chunked_gather
            self._wait(done + seconds / ranks, event)
            self.chunked_gather = None
        if kernel.name == "split_with_sizes_copy":
            self.copied_out_s = self.device_s

    def _run_collective(self, kernel: Kernel) -> None:
        event = kernel.op.event
        assert event
        of_fsdp = event.issuer == "fsdp"
        self.host_s += self.cluster[self._host_time(event)] * 1e-6
        free = max(self.groups.get(event.axis, 0.0), self.host_s)
        if self.host_s > self.device_s:  # whatever the device does next is launched later
            self.seconds["waiting for the host"] += self.host_s - self.device_s
            self.device_s = self.host_s
        if not of_fsdp:
            start = max(free, self.device_s - self._overlap_s(event))
        elif event.collective == "all_gather":
            start = max(free, self.copied_out_s)
        elif event.collective == "all_reduce" and self.pending_reduce_scatter:
            # Of replicas: it follows its reduce-scatter.
            start = max(free, self.reduced_s)
        else:
            start = max(free, self.device_s)
        done = start + kernel.seconds
        if event.collective == "reduce_scatter" and start < self.device_s:
            done = max(done, self.device_s + kernel.seconds / event.ranks)
        self._record(kernel, event.axis, start, kernel.seconds)
        self.groups[event.axis] = done
        if self._is_chunked(event):
            self.copy_engine_axes.add(event.axis)
        if self._is_chunked(event) and event.collective == "all_gather":
            self.chunked_gather = done, event, event.ranks
            done = start + kernel.seconds / event.ranks
        if of_fsdp and event.collective == "all_reduce":
            self.pending_all_reduce = done, event
        elif of_fsdp and event.collective == "reduce_scatter":
            self.reduced_s, self.pending_reduce_scatter = done, event
        elif kernel.op.name.endswith("_") and not of_fsdp:  # c10d's own, which the step waits for
            self._wait(done, event)
        else:
            filled = kernel.op.writes or kernel.op.reads
            self.pending[filled[0][0]] = (done, event)

    def _is_chunked(self, event: Event) -> bool:
        return self.in_chunks and event.issuer == "dtensor" and event.collective != "all_reduce"

    def _overlap_s(self, event: Event) -> float:
        """How long ago a scatter in chunks began: with the second chunk of the matmul that produces its input."""
        if self._is_chunked(event) and event.collective == "reduce_scatter":
            return self.last_matmul_s * (1 - 1 / event.ranks)
        return 0.0

    def _host_time(self, event: Event) -> str:
        by_rule = event.issuer == "dtensor"
        return "collective_host_us" if by_rule and self.compiled else HOST_TIME.get(event.issuer, "launch_us")

    def _wait_for_storage(self, storage: int) -> None:
        if storage in self.pending:
            self._wait(*self.pending.pop(storage))

    def _wait(self, done: float, event: Event) -> None:
        if done > self.device_s:
            self.seconds[f"exposed/{collective_key(event)}"] += done - self.device_s
            self.device_s = done

    def _finish(self) -> None:
        """The end of a part waits for all pending collectives."""
        if self.pending_reduce_scatter:
            self._wait(self.reduced_s, self.pending_reduce_scatter)
            self.pending_reduce_scatter = None
        if self.pending_all_reduce:
            waited_s = max(0.0, self.pending_all_reduce[0] - self.device_s)
            self.network_s += min(waited_s, self.beside_network_s)
            self._wait(*self.pending_all_reduce)
            self.pending_all_reduce, self.beside_network_s = None, 0.0
        self.pending.clear()

    def _record(self, kernel: Kernel, stream: str, start: float, seconds: float) -> None:
        event = kernel.op.event if kernel.kind == "collective" else None
        self.seconds[f"sent/{collective_key(event)}" if event else kernel.kind] += seconds
        if self.spans is not None:
            self.spans.append(Span(stream, kernel.name, start, seconds))


def collective_key(one: Event | Entry) -> str:
    """What follows `sent/` and `exposed/` in the names of seconds."""
    return f"{one.axis}/{one.phase}/{one.issuer}/{one.collective}"


def replay(
    parts: Sequence[Sequence[Kernel]],
    micro_batches: int,
    cluster: Cluster,
    world: int,
    spans: list[Span] | None = None,
    compiled: bool = False,
    in_chunks: bool = False,
) -> dict[str, float]:
    """Seconds of a step: `step`, busy time by kind, and of collectives `sent/...` and `exposed/...`.

    Args:
        parts: the recorded micro-batches, then what is done once per step. micro_batches: their actual number.
        compiled, in_chunks: see `Streams`.
    """
    streams = Streams(cluster, compiled, in_chunks, _ranks_per_core(cluster, world), spans=spans)
    *batches, end = parts
    repeats = max(0, micro_batches - len(batches))
    batches = of_fewer(batches, micro_batches)
    middle = len(batches) // 2
    for index, batch in enumerate(batches):
        streams.run(batch)
        if index == middle and repeats:
            _repeat(streams, batch, repeats)
    streams.run(end)
    total = max(streams.device_s, streams.host_s)
    if cluster.is_cpu:
        slower = (total - streams.network_s) * (world > 1)
    else:
        slower = total * max(0, cluster.hosts_of(world) - 1).bit_length()
    stragglers = slower * cluster["scale_slowdown"]
    return {**streams.seconds, "stragglers": stragglers, "step": total + stragglers}


def _repeat(streams: Streams, batch: Sequence[Kernel], repeats: int) -> None:
    """Repeat a micro-batch, at least once: it is run once or twice, and all further ones take as long as the last."""
    if repeats > 1:
        streams.run(batch)
    before, spent = max(streams.device_s, streams.host_s), streams.seconds.copy()
    sent_s = streams.network_s
    ahead = streams.device_s - streams.host_s
    streams.run(batch)
    if repeats > 2:
        left = repeats - 2
        grown = left * (max(streams.device_s, streams.host_s) - before)
        lead = streams.device_s - streams.host_s - ahead
        if streams.spans is not None:
            stream = "cpu" if streams.cluster.is_cpu else "device"
            ends = {stream: streams.device_s, **streams.groups}
            streams.spans += [Span(one, f"{left} more micro-batches", at, grown) for one, at in ends.items()]
        streams.host_s += grown - (left * lead if lead > 0 else 0.0)
        streams.device_s += grown
        streams.copied_out_s += grown
        streams.reduced_s += grown
        streams.network_s += left * (streams.network_s - sent_s)
        streams.groups = {axis: at + grown for axis, at in streams.groups.items()}
        for name, seconds in streams.seconds.items():
            streams.seconds[name] = seconds + left * (seconds - spent[name])


def _ranks_per_core(cluster: Cluster, world: int) -> float:
    if cluster.shared_cores is None:
        return 1.0
    return max(1.0, min(world, cluster.devices_per_host) / cluster.shared_cores)
