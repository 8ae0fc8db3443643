"""Prices and streams by hand: what each op and collective takes, what overlaps, and what a cluster has to state."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest
from support.composed import config

from tpresearch.config.axes import MeshSizes
from tpresearch.config.errors import ConfigError
from tpresearch.launch.composition import conf_dir, read_option
from tpresearch.ledger.entries import Event
from tpresearch.simulate.cluster import NUMBERS, Cluster, Number, SourceKind, check_world, parse_cluster
from tpresearch.simulate.kernels import Kernel, kernels
from tpresearch.simulate.network import Route, collective_s, network_s, route
from tpresearch.simulate.prediction import Prediction, rows_that_fit
from tpresearch.simulate.prices import attention_s, bytes_s, gemm_s, moved_bytes, op_s
from tpresearch.simulate.replay import Span, replay
from tpresearch.simulate.trace import Op

CLUSTERS = sorted(path.stem for path in (conf_dir() / "cluster").glob("*.yaml"))
PLAIN = {
    "memory_gb": 100,
    "peak_tflops_bfloat16": 100,
    "peak_tflops_float32": 10,
    "peak_tflops_float64": 1,
    "compute_units": 100,
    "gemm_efficiency": 0.5,
    "bandwidth_gb_s": 1000,
    "bandwidth_efficiency": 0.5,
    "optimizer_efficiency": 0.25,
    "copy_efficiency": 0.5,
    "attention_narrow_heads": 0.5,
    "intra_gb_s": 100,
    "inter_gb_s": 10,
    "inter_efficiency": 0.5,
}


def cluster(**changed: float) -> Cluster:
    """Round numbers; what is not named is 0, and attention runs at 20 TFLOP/s forward, 10 backward."""
    values: dict[str, object] = {**dict.fromkeys(NUMBERS, 0), **PLAIN, **changed}
    values |= {"attention_tflops_forward": [20] * 6, "attention_tflops_backward": [10] * 6}
    numbers = {
        name: {"value": value, "kind": "guessed", "source": "a test"} for name, value in values.items()
    }
    return parse_cluster({"name": "round", "device": "a test's", "devices_per_host": 8, "numbers": numbers})


def op(
    kind: str,
    name: str = "op",
    reads: Iterable[tuple[int, int]] = (),
    writes: Iterable[tuple[int, int]] = (),
    event: Event | None = None,
    phase: str = "forward",
) -> Op:
    return Op(phase, kind, name, tuple(reads), tuple(writes), 2, (), event, -1)


def test_fused_adamw_is_slower_per_byte_in_bfloat16() -> None:
    """On two H200 by a third; a CPU's rate is measured in the dtype that it trains in."""
    reads = [(n, 4_000_000) for n in range(4)]  # weight, gradient, moments; all but the gradient are written
    of_bfloat16 = op("optimizer", "_fused_adamw_", reads)
    of_float32 = of_bfloat16._replace(element=4)
    assert op_s(of_float32, cluster()) == pytest.approx(28e6 / 250e9)
    assert op_s(of_bfloat16, cluster()) == pytest.approx(28e6 / (0.65 * 250e9))


def test_adamw_of_our_own_moves_its_tensors_once_compiled_and_46_float32_numbers_per_element_in_plain_torch() -> (
    None
):
    """A million weights in bfloat16 with gradient, moments, and a scalar; 500 of 1,000 GB/s."""
    reads = [(0, 2_000_000), (1, 2_000_000), (2, 2_000_000), (3, 2_000_000), (4, 4)]
    compiled = op_s(op("optimizer", "adamw_", reads), cluster())
    assert compiled == pytest.approx(14e6 / 500e9, rel=1e-5)
    copied = [*((n, 4_000_000) for n in range(4)), (4, 2_000_000), (5, 4)]  # a copy is written, and not read
    assert op_s(op("optimizer", "adamw_", copied), cluster()) == pytest.approx(30e6 / 500e9, rel=1e-5)
    assert op_s(op("optimizer", "adamw_ in plain torch", reads), cluster()) == pytest.approx(184e6 / 500e9)
    # A weight in two halves of 2 bytes, with a gradient and moments of 4: 20 bytes instead of 22 with bfloat16 moments.
    for moments, moved in ((4_000_000, 28e6), (2_000_000, 20e6)):
        halves = [(0, 2_000_000), (1, 4_000_000), (2, moments), (3, moments), (4, 2_000_000), (5, 4)]
        assert op_s(op("optimizer", "adamw_", halves), cluster()) == pytest.approx(moved / 500e9, rel=1e-5)
    plain = op("optimizer", "adamw_ in plain torch", halves)
    assert op_s(plain, cluster()) == pytest.approx((46 + 22) * 4e6 / 500e9)


def test_attention_by_length_and_head_width() -> None:
    """20 TFLOP/s from length 512 on; below by the root of the length, and half of it for each halving of the width."""
    plain = 4 * 8 * 4096**2 * 128 / 2 / 20e12
    assert attention_s((1, 8, 8, 4096, 4096, 128, 0, 1), 2, cluster(compute_units=1)) == pytest.approx(plain)
    narrow = attention_s((1, 8, 8, 4096, 4096, 32, 0, 1), 2, cluster(compute_units=1))
    assert narrow == pytest.approx(plain / 4 * 4)
    short = attention_s((1, 8, 8, 128, 128, 128, 0, 1), 2, cluster(compute_units=1))
    assert short == pytest.approx(plain / 1024 * 2)


def test_short_attention_is_bound_by_its_bytes() -> None:
    """8,192 rows of 8 tokens, at 20 TFLOP/s by the root of 1/64, and 0.5 TB/s."""
    touched = [(number, 2 * 8192 * 8 * 128) for number in range(4)]
    short = op("attention", "sdpa", touched[:3], touched[3:])._replace(shape=(8192, 1, 1, 8, 8, 128, 0, 1))
    assert op_s(short, cluster()) == pytest.approx(4 * 2 * 8192 * 8 * 128 / 500e9)
    assert attention_s(short.shape, 2, cluster()) < 0.5 * op_s(short, cluster())


def test_a_table_of_attention_may_begin_earlier() -> None:
    """Eight entries begin at length 128."""
    numbers = dict(cluster(compute_units=1).numbers)
    numbers["attention_tflops_forward"] = Number((1.0, 2.0, *[20.0] * 6), SourceKind.guessed, "a test")
    early = dataclasses.replace(cluster(compute_units=1), numbers=numbers)
    between = 2e12 + 18e12 * math.log2(1.5)
    for length, rate in ((128, 1e12), (256, 2e12), (384, between), (512, 20e12), (16384, 20e12)):
        found = attention_s((1, 8, 8, length, length, 128, 0, 1), 2, early)
        assert found == pytest.approx(4 * 8 * length**2 * 128 / 2 / rate)


def test_few_blocks_of_attention_leave_units_idle() -> None:
    """Of 200 blocks of 128 tokens at a time, and of 100 in backward; no fewer than a tenth are busy."""
    for heads, backward, busy in ((8, 0, 32 / 200), (8, 1, 32 / 100), (4, 0, 0.1), (1, 1, 0.1), (64, 0, 1.0)):
        few = (1, heads, heads, 512, 512, 128, backward, 1)
        whole = 4 * heads * 512**2 * 128 / 2 * (2.5 if backward else 1) / (10e12 if backward else 20e12)
        assert attention_s(few, 2, cluster()) == pytest.approx(whole / busy)


def test_each_kernel_takes_some_time_whatever_it_moves() -> None:
    touched = [(0, 100)], [(1, 100)]
    for kind, name, shape in (
        ("gemm", "mm", (1, 8, 8, 8)),
        ("attention", "sdpa", (1, 1, 1, 8, 8, 128, 0, 1)),
        ("other", "exp", ()),
        ("other", "chunk_cat", ()),
    ):
        one = op(kind, name, *touched)._replace(shape=shape)
        assert op_s(one, cluster(kernel_us=7)) - op_s(one, cluster()) == pytest.approx(7e-6)


@pytest.mark.parametrize(
    ("name", "reads", "writes", "moved"),
    [
        ("gather", (10**9, 80), 100, 200),
        ("index_select", (10**9, 80), 100, 200),
        ("index", (10**9, 80), 100, 200),
        ("scatter_", (10**9, 800, 500), 10**9, 800 + 500 + 200),  # 100 numbers of 2 bytes are written
        ("scatter_add_", (10**9, 800, 500), 10**9, 800 + 500 + 2 * 200),
        ("nll_loss_forward", (10**9, 800), 4, 800),
        ("_foreach_mul_", (100, 100), 0, 400),
        ("_foreach_norm", (100, 100), 4, 204),
    ],
)
def test_what_an_op_moves_may_differ_from_its_tensors(
    name: str, reads: tuple[int, ...], writes: int, moved: float
) -> None:
    made = [(9, writes)] if writes else []
    assert moved_bytes(op("other", name, enumerate(reads), made)) == moved


def test_copies_of_fsdp_have_a_rate_of_their_own() -> None:
    moved = op("other", "chunk_cat", reads=[(0, 10**9)], writes=[(1, 10**9)])
    assert op_s(moved, cluster()) == pytest.approx(1e9 / 500e9)
    assert op_s(moved, cluster(copy_efficiency=0.1)) == pytest.approx(1e9 / 100e9)
    gathered = op("other", "all_gather_copy_in", [(0, 10**6)], [(1, 10**9), (1, 8 * 10**9)])
    assert op_s(gathered, cluster()) == pytest.approx(2e9 / 500e9)


def test_on_a_cpu_ranks_wait_for_the_slowest() -> None:
    ops = [op("other", reads=[(n, 10**9)], writes=[(n + 1, 10**9)]) for n in range(3)]
    here = dataclasses.replace(cluster(scale_slowdown=0.1), shared_cores=2)
    one = [each._replace(fused=0) for each in ops]
    assert len(kernels(one, cluster(), MeshSizes(), compiled=False)) == 1
    found = kernels(ops, here, MeshSizes(), compiled=False)
    assert [round(kernel.seconds * 500) for kernel in found] == [2, 2, 2]
    alone = replay([found, []], 1, here, 1)["step"]
    assert alone == pytest.approx(3 * 2 / 500)
    assert replay([found, []], 1, here, 2)["step"] == pytest.approx(alone * 1.1)
    assert replay([found, []], 1, here, 4)["step"] == pytest.approx(alone * 2 * 1.1)
    sent = gather(1, 2 / 500)._replace(network_s=2 / 500)  # a network takes what it takes
    assert replay([[sent], []], 1, here, 4)["step"] == pytest.approx(2 / 500)


def test_ranks_on_shared_cores_work_while_others_collectives_wait() -> None:
    """Four ranks on two cores: a collective that keeps three quarters of its core takes half as long again."""
    event = Event("dp_shard", "forward", "fsdp", "all_gather", 10**9, 4)
    sent = Kernel("collective", "all_gather", 2.0, op("collective", reads=[(0, 8)], event=event))
    for ranks, busy, seconds in ((2, 0.75, 2.0), (4, 0.75, 3.0), (4, 0.25, 2.0), (8, 0.75, 6.0)):
        here = dataclasses.replace(cluster(overlap_slowdown=busy), shared_cores=2)
        assert replay([[sent], []], 1, here, ranks)["step"] == pytest.approx(seconds)


def test_a_matmul_takes_whole_waves_of_tiles() -> None:
    """100 tiles of 256 x 128 are one wave of 100 units; one row more begins a second."""
    one_wave = 2 * 2560 * 1280 * 4096 / 50e12
    assert gemm_s((1, 2560, 1280, 4096), 2, cluster()) == pytest.approx(one_wave)
    assert gemm_s((1, 2561, 1280, 4096), 2, cluster()) > 1.05 * one_wave
    assert gemm_s((1, 2560, 1280, 4096), 4, cluster()) == pytest.approx(10 * one_wave)
    begun = cluster(gemm_half_depth=1024)
    assert gemm_s((1, 2560, 1280, 4096), 2, begun) == pytest.approx(one_wave * 1.25)


def test_a_deep_matmul_of_few_tiles_is_split_among_all_units() -> None:
    """Of four tiles of 64 x 64, at 1.15 times their work, where 100 units have parts 512 deep; less deep, in fewer such parts,
    and no faster than one that is half as deep."""
    fast, tile = cluster(bandwidth_gb_s=1e6), 2 * 1.6 * 64 * 64 / 50e12
    assert gemm_s((1, 128, 128, 16384), 2, fast) == pytest.approx(tile * 1.15 * 4 * 16384)
    assert gemm_s((1, 128, 128, 2048), 2, fast) == pytest.approx(tile * 1.15 * 100 * 512)
    assert gemm_s((1, 128, 128, 512), 2, fast) == pytest.approx(tile * 100 * 512)
    times = [gemm_s((1, 128, 128, depth), 2, fast) for depth in range(64, 20_000, 64)]
    assert times == sorted(times)


def test_a_matmul_that_adds_to_a_sum_reads_it_too() -> None:
    """A hundred million numbers in float32, beside thin factors in bfloat16."""
    reads = [(0, 4 * 10**8), (1, 20_000), (2, 20_000)]
    adds = op("gemm", "add_product_", reads)._replace(shape=(1, 10_000, 10_000, 1))
    assert op_s(adds, cluster()) == pytest.approx((2 * 4 * 10**8 + 40_000) / 500e9)
    assert op_s(adds._replace(name="mm"), cluster()) == pytest.approx((2 * 10**8 + 40_000) / 500e9)


def test_a_row_of_an_embedding_is_read_and_written() -> None:
    found = op_s(op("other", "embedding", [(0, 10**9), (1, 80)], [(2, 10**6)]), cluster())
    assert found == pytest.approx(bytes_s(2 * 10**6, cluster()))


@pytest.mark.parametrize("name", ["index_put_", "index_add_"])
def test_rows_that_are_added_to_a_tensor_are_read_added_to_and_written(name: str) -> None:
    found = op_s(op("other", name, [(0, 10**9), (1, 80), (2, 10**6)], [(0, 10**9)]), cluster())
    assert found == pytest.approx(bytes_s(3 * (80 + 10**6), cluster()))


def test_a_matmul_in_float8_has_a_peak_of_its_own_and_writes_bfloat16() -> None:
    fast = cluster(peak_tflops_float8=200)
    shape = (1, 2560, 1280, 4096)
    assert gemm_s(shape, 2, fast) / gemm_s(shape, 1, fast) == pytest.approx(1.85)
    thin = cluster(peak_tflops_float8=1e5)
    assert gemm_s((1, 4096, 4096, 1), 1, thin) == pytest.approx((2 * 4096 + 2 * 4096**2) / 500e9)
    with pytest.raises(ConfigError, match=r"^cluster.numbers.peak_tflops_float8.value=0"):
        gemm_s(shape, 1, cluster())


def test_a_cluster_without_matmuls_in_float8_need_not_say_so() -> None:
    plain = read_option("cluster", CLUSTERS[0])
    del plain["numbers"]["peak_tflops_float8"]
    assert parse_cluster(plain)["peak_tflops_float8"] == 0.0
    assert "peak_tflops_float8" not in dict(parse_cluster(plain).assumptions())
    plain["numbers"]["peak_tflops_float8"] = 0
    with pytest.raises(ConfigError, match=r"^cluster.numbers.peak_tflops_float8=0"):
        parse_cluster(plain)


def test_a_thin_matmul_is_bound_by_its_bytes() -> None:
    moved = (8192 * 8192 + 2 * 8192) * 2
    assert gemm_s((1, 1, 8192, 8192), 2, cluster(peak_tflops_bfloat16=1e5)) == pytest.approx(moved / 500e9)


def test_attention_counts_half_of_its_square_and_more_for_backward() -> None:
    shape = (8, 32, 32, 4096, 4096, 128)
    whole = 4 * 8 * 32 * 4096 * 4096 * 128
    assert attention_s((*shape, 0, 1), 2, cluster()) == pytest.approx(whole / 2 / 20e12)
    assert attention_s((*shape, 0, 0), 2, cluster()) == pytest.approx(whole / 20e12)
    assert attention_s((*shape, 1, 1), 2, cluster()) == pytest.approx(2.5 * whole / 2 / 10e12)
    in_float32 = attention_s((*shape, 0, 1), 4, cluster())
    assert in_float32 == pytest.approx(10 * whole / 2 / 20e12)  # as matmuls are


@pytest.mark.parametrize(
    ("collective", "where", "seconds"),
    [
        ("all_gather", Route(8, 8), 7 / 8 * 1e9 / 100e9),
        ("all_reduce", Route(8, 8), 2 * 7 / 8 * 1e9 / 100e9),
        ("reduce_scatter", Route(16, 8), 15 / 16 * 1e9 / 40e9),  # eight links of 5 GB/s each
        ("all_gather", Route(4, 1), 3 / 4 * 1e9 / 5e9),
        ("all_gather", Route(1, 1), 0.0),
    ],
)
def test_a_ring_moves_its_bytes_over_the_narrowest_link(
    collective: str, where: Route, seconds: float
) -> None:
    assert collective_s(collective, 10**9, where, cluster()) == pytest.approx(seconds)


def test_links_of_a_host_bound_the_rings_that_pass_through_them_alone() -> None:
    narrow = cluster(intra_gb_s=1.0)
    assert collective_s("all_gather", 10**9, Route(16, 8), narrow) == pytest.approx(15 / 16)
    assert collective_s("all_gather", 10**9, Route(4, 1), narrow) == pytest.approx(3 / 4 / 5)


def test_small_messages_cost_latency_that_grows_with_the_ring() -> None:
    slow = cluster(intra_step_us=10.0, collective_us=5.0)
    assert collective_s("all_gather", 0, Route(8, 8), slow) == pytest.approx(5e-6 + 7 * 10e-6 * 0.2)  # by LL
    assert collective_s("all_gather", 10**9, Route(8, 8), slow) == pytest.approx(5e-6 + 70e-6 + 8.75e-3)
    by_ll128 = 5e-6 + 35e-6 + 35e-6 / 0.92
    assert collective_s("all_gather", 4 * 10**6, Route(8, 8), slow) == pytest.approx(by_ll128)
    assert collective_s("all_gather", 10**6, Route(8, 8), slow) == pytest.approx(5e-6 + 14e-6 + 8.75e-6 / 0.4)


def test_between_hosts_an_all_reduce_takes_a_tree_where_its_steps_are_fewer() -> None:
    """Its latency alone, by LL: twice the 7 steps of a host and log2 of the hosts, or the ring's twice n - 1."""
    slow = cluster(intra_step_us=1.0, inter_step_us=100.0)
    for hosts, between in ((4, 2 * 2), (2, 2 * 1)):
        found = collective_s("all_reduce", 0, Route(8 * hosts, 8), slow)
        assert found == pytest.approx(0.2 * (2 * 7 * 1e-6 + between * 100e-6))
    ring = 0.2 * (2 - 1) * ((15 - 1) * 1e-6 + 100e-6)
    assert collective_s("all_gather", 0, Route(16, 8), slow) == pytest.approx(ring)


@pytest.mark.parametrize(("ranks", "steps"), [(2, 1), (4, 3)])
def test_each_step_of_gloos_ring_takes_time_and_its_reduce_scatter_is_an_all_reduce(
    ranks: int, steps: int
) -> None:
    here = dataclasses.replace(cluster(intra_step_us=10.0, inter_step_us=1e3), shared_cores=2)
    for collective, passes in (("all_reduce", 2), ("all_gather", 1), ("reduce_scatter", 2)):
        for where in (Route(ranks, ranks), Route(ranks, 1)):
            assert collective_s(collective, 0, where, here) == pytest.approx(passes * steps * 10e-6)


def test_of_a_collective_between_hosts_its_bytes_are_the_networks_time() -> None:
    here = dataclasses.replace(cluster(intra_step_us=10.0), shared_cores=2)
    where = Route(4, 2)
    assert network_s("all_gather", 10**9, where, here) == pytest.approx(3 / 4 * 1e9 / 10e9)
    assert network_s("all_gather", 10**9, Route(4, 4), here) == 0
    steps = collective_s("all_reduce", 10**9, where, here) - network_s("all_reduce", 10**9, where, here)
    assert steps == pytest.approx(60e-6)


@pytest.mark.parametrize(("collective", "passes"), [("all_gather", 1), ("reduce_scatter", 2)])
def test_gloo_copies_what_it_gathers_and_scatters(collective: str, passes: int) -> None:
    """At the rate of FSDP's copies; the rest is the same share of an all-reduce."""
    here = dataclasses.replace(cluster(copy_efficiency=0.5), shared_cores=2)
    whole = collective_s("all_reduce", 10**9, Route(2, 2), here)
    copied = 2e9 / (here["bandwidth_gb_s"] * 1e9 * 0.5)
    assert collective_s(collective, 10**9, Route(2, 2), here) == pytest.approx(whole * passes / 2 + copied)


def test_where_the_ranks_of_an_axis_are() -> None:
    sizes = MeshSizes(dp_replicate=2, dp_shard=4, tp=4)
    assert route("tp", sizes, cluster()) == Route(4, 4)
    assert route("dp_shard", sizes, cluster()) == Route(4, 2)
    assert route("dp_replicate", sizes, cluster()) == Route(2, 1)
    assert route("world", sizes, cluster()) == Route(32, 8)  # a group that is no axis


@pytest.mark.parametrize(
    ("tp", "ranks", "per_host"), [(3, 24, 1), (3, 6, 3), (6, 24, 2), (12, 24, 4), (16, 32, 8)]
)
def test_the_group_that_hosts_of_eight_split_most_stands_for_all(tp: int, ranks: int, per_host: int) -> None:
    """Of every three neighbours, some are two on one host and one on the next."""
    assert route("tp", MeshSizes(dp_shard=ranks // tp, tp=tp), cluster()) == Route(tp, per_host)


GATHER = Event("dp_shard", "forward", "fsdp", "all_gather", 0, 8)


def gather(storage: int, seconds: float) -> Kernel:
    return Kernel("collective", "all_gather", seconds, op("collective", writes=[(storage, 0)], event=GATHER))


def work(seconds: float) -> Kernel:
    return Kernel("gemm", "mm", seconds, op("gemm"))


def wait_for(storage: int) -> Kernel:
    return Kernel("wait", "wait_tensor", 0.0, op("wait", reads=[(storage, 0)]))


def copy_out(storage: int) -> Kernel:
    return Kernel("copy", "split_with_sizes_copy", 0.0, op("other", "split_with_sizes_copy", [(storage, 0)]))


@pytest.mark.parametrize(("gathering", "step", "exposed"), [(1.0, 5.0, 1.0), (3.0, 8.0, 4.0)])
def test_a_gather_overlaps_with_the_block_before_it(gathering: float, step: float, exposed: float) -> None:
    """Two blocks of 2 s: the first gather is exposed, the second only as far as it outlasts the first block."""
    part = [gather(1, gathering), copy_out(1), gather(2, gathering), work(2.0), copy_out(2), work(2.0)]
    found = replay([part, []], 1, cluster(), 8)
    assert found["step"] == pytest.approx(step)
    assert found["exposed/dp_shard/forward/fsdp/all_gather"] == pytest.approx(exposed)


@pytest.mark.parametrize(("network_s", "step"), [(0.0, 4.0), (0.5, 3.25), (0.75, 3.0), (1.0, 3.0)])
def test_ranks_that_share_a_core_slow_down_what_it_does_but_not_the_network(
    network_s: float, step: float
) -> None:
    event = Event("tp", "forward", "dtensor", "all_gather", 0, 2)
    sent = Kernel("collective", "all_gather", 1.0, op("collective", event=event), network_s)
    shared = dataclasses.replace(cluster(overlap_slowdown=1.0), shared_cores=4)
    found = replay([[sent, work(1.0)], []], 1, shared, 8)
    assert found["step"] == pytest.approx(step)
    assert found["exposed/tp/forward/dtensor/all_gather"] == pytest.approx(step - 2.0)


def test_on_a_cpu_sums_of_gradients_over_replicas_go_on_beside_backward() -> None:
    """Each takes 2 s, for one of which its threads are at work; FSDP waits for one that follows its reduce-scatter."""
    event = Event("dp_replicate", "backward", "fsdp", "all_reduce", 0, 2)
    summed = Kernel("collective", "all_reduce", 2.0, op("collective", event=event))
    here = dataclasses.replace(cluster(overlap_slowdown=0.5, scale_slowdown=0.1), shared_cores=2)

    def step_s(*part: Kernel) -> float:
        found = replay([part, []], 1, here, 2)
        busy = found["gemm"] + sum(seconds for name, seconds in found.items() if name.startswith("exposed"))
        assert found["step"] == pytest.approx(busy + found["stragglers"])
        sums = sum(kernel.name == "all_reduce" for kernel in part)
        assert found["sent/dp_replicate/backward/fsdp/all_reduce"] == pytest.approx(2.0 * sums)
        return found["step"]

    assert step_s(summed, work(3.0)) == pytest.approx(4.0 * 1.1)
    assert step_s(work(3.0), summed) == pytest.approx(5.0 * 1.1)
    assert step_s(summed, summed, work(1.0)) == pytest.approx(4.0 * 1.1)
    assert step_s(*scatter(0.0), summed, work(3.0)) == pytest.approx(5.0 * 1.1)
    on_links = summed._replace(network_s=2.0)  # for which no rank waits longer than another
    assert step_s(on_links, work(0.5)) == pytest.approx(2.0 + 0.5 * 0.1)
    assert step_s(on_links, work(3.0)) == pytest.approx(3.0 * 1.1)


def test_ranks_that_share_a_core_issue_their_ops_in_turn() -> None:
    shared = dataclasses.replace(cluster(launch_us=1e5), shared_cores=4)
    assert replay([[work(0.0)] * 10, []], 1, shared, 8)["step"] == pytest.approx(2.0)


def scatter(seconds: float) -> list[Kernel]:
    """The copy of a unit's gradients and the collective that sums it."""
    event = Event("dp_shard", "backward", "fsdp", "reduce_scatter", 0, 8)
    copy_in = Kernel("copy", "chunk_cat", 0.0, op("other", "chunk_cat"))
    return [copy_in, Kernel("collective", "reduce_scatter", seconds, op("collective", event=event))]


@pytest.mark.parametrize(
    ("first", "after", "of_replicas", "step", "exposed"),
    [
        (1.0, 0.0, 0.0, 7.0, 3.0),
        (3.0, 0.0, 0.0, 8.0, 4.0),
        (3.0, 4.0, 0.0, 9.0, 1.0),
        (1.0, 0.0, 2.0, 9.0, 3.0),
    ],
)
def test_the_next_gradients_wait_for_the_last_sum_and_the_end_of_backward_for_all(
    first: float, after: float, of_replicas: float, step: float, exposed: float
) -> None:
    """Two blocks of 2 s, whose gradients take `first` and 3 s, and a third block; a sum over replicas follows that over shards."""
    event = Event("dp_replicate", "backward", "fsdp", "all_reduce", 0, 2)
    replicas = Kernel("collective", "all_reduce", of_replicas, op("collective", event=event))
    part = [work(2.0), *scatter(first), work(2.0), *scatter(3.0), work(after)]
    part += [replicas] if of_replicas else []
    found = replay([part, []], 1, cluster(), 16)
    assert found["step"] == pytest.approx(step)
    assert found["exposed/dp_shard/backward/fsdp/reduce_scatter"] == pytest.approx(exposed)
    if of_replicas:
        assert found["exposed/dp_replicate/backward/fsdp/all_reduce"] == pytest.approx(of_replicas)


def test_a_sum_that_the_step_itself_sends_is_waited_for() -> None:
    event = Event("dp_shard", "clip", "clip", "all_reduce", 4, 8)
    sent = Kernel("collective", "all_reduce", 1.0, op("collective", "allreduce_", [(1, 4)], event=event))
    assert replay([[sent, work(1.0)], []], 1, cluster(), 8)["step"] == pytest.approx(2.0)


def test_micro_batches_that_are_not_recorded_take_as_long_as_the_last() -> None:
    part = [gather(1, 1.0), copy_out(1), work(2.0)]
    few, many = (replay([part, part, [work(0.5)]], n, cluster(), 8) for n in (2, 10))
    assert few["step"] == pytest.approx(6.5)
    assert many["step"] == pytest.approx(30.5)
    assert many["gemm"] == pytest.approx(20.5)


@pytest.mark.parametrize("shared_cores", [None, 8.0])
def test_the_timeline_has_micro_batches_that_are_not_recorded_as_one_span(shared_cores: float | None) -> None:
    """Nothing overlaps on a stream, and the device is busy from the first kernel to the end."""
    part, spans = [gather(1, 1.0), copy_out(1), work(2.0)], list[Span]()
    where = dataclasses.replace(cluster(), shared_cores=shared_cores)
    found = replay([part, part, [work(0.5)]], 10, where, 8, spans)
    (left, *_) = (span.seconds for span in spans if span.name == "6 more micro-batches")
    assert left == pytest.approx(18.0)
    for stream in {span.stream for span in spans}:
        mine = [span for span in spans if span.stream == stream]
        for one, after in itertools.pairwise(mine):
            assert after.start_s >= one.start_s + one.seconds - 1e-9
    last = spans[-1]
    assert last.start_s + last.seconds == pytest.approx(found["step"])


def test_the_host_may_be_what_a_step_waits_for() -> None:
    found = replay([[work(0.0)] * 10, []], 1, cluster(launch_us=1e5), 8)
    assert found["step"] == pytest.approx(1.0)
    assert found["waiting for the host"] == pytest.approx(1.0)


def test_a_host_that_is_behind_stays_so_over_micro_batches_that_are_not_recorded() -> None:
    part = [work(0.05)] * 10
    found = replay([part, part, [work(0.0)] * 5], 10, cluster(launch_us=1e5), 8)
    assert found["step"] == pytest.approx(10 * 1.0 + 0.5)


def test_a_gather_that_the_host_issues_late_is_exposed_no_longer_than_it_takes() -> None:
    """Issued after 1 s, done after 1.5 s, copied out after 2 s: the device waits 0.5 s for it, and else for the host."""
    part = [work(0.5), gather(1, 0.5), copy_out(1), work(2.0)]
    found = replay([part, []], 1, cluster(collective_host_us=1e6), 8)
    assert found["step"] == pytest.approx(4.0)
    assert found["exposed/dp_shard/forward/fsdp/all_gather"] == pytest.approx(0.5)
    assert found["waiting for the host"] == pytest.approx(1.0)


def test_zeros_like_a_tensor_are_written_and_nothing_is_read() -> None:
    found = [op_s(op("other", name, [(1, 100)], [(2, 100)]), cluster()) for name in ("zeros_like", "exp")]
    assert found == pytest.approx([bytes_s(100, cluster()), bytes_s(200, cluster())])


def test_more_hosts_are_slower_by_each_doubling() -> None:
    slow = cluster(scale_slowdown=0.1)
    found = [replay([[work(1.0)], []], 1, slow, ranks) for ranks in (8, 16, 128)]
    assert [one["step"] for one in found] == pytest.approx([1.0, 1.1, 1.4])
    assert [one["stragglers"] for one in found] == pytest.approx([0.0, 0.1, 0.4])


@pytest.mark.parametrize(("compiled", "seconds"), [(False, 2.0), (True, 0.5)])
def test_compiled_code_issues_the_collectives_of_a_rule_without_dispatch(
    compiled: bool, seconds: float
) -> None:
    event = Event("tp", "forward", "dtensor", "all_gather", 0, 8)
    sent = Kernel("collective", "all_gather", 0.0, op("collective", writes=[(1, 0)], event=event))
    slow = cluster(tensor_host_us=2e6, collective_host_us=5e5)
    assert replay([[sent], []], 1, slow, 8, compiled=compiled)["step"] == pytest.approx(seconds)


def test_compiled_elementwise_ops_are_one_kernel() -> None:
    """Read from outside once, written where it is read later: 3 ops of 100 bytes move 200 instead of 600."""
    matmul = op("gemm", "mm")._replace(shape=(1, 1, 1, 1))
    chain = [op("other", "mul", [(i, 100)], [(i + 1, 100)]) for i in range(3)]
    ops = [matmul, *chain, op("gemm", "mm", [(3, 100)])._replace(shape=(1, 1, 1, 1))]
    sizes = MeshSizes()
    eager, compiled = (
        sum(k.seconds for k in kernels(ops, cluster(), sizes, compiled) if k.kind == "elementwise")
        for compiled in (False, True)
    )
    assert eager == pytest.approx(bytes_s(600, cluster()))
    assert compiled == pytest.approx(bytes_s(200, cluster()))
    (_, unread) = kernels(ops[:-1], cluster(), sizes, compiled=True)  # in this part: another may read it
    assert unread.seconds == pytest.approx(bytes_s(200, cluster()))


def test_a_gradient_that_is_added_to_is_written_too() -> None:
    """Nothing in the micro-batch reads the sum again: 300 bytes, not 200."""
    matmul = op("gemm", "mm", [], [(1, 100)])._replace(shape=(1, 1, 1, 1), phase="backward")
    adding = op("other", "add_", [(0, 100), (1, 100)], [(0, 100)])._replace(phase="backward")
    kernel = kernels([matmul, adding], cluster(), MeshSizes(), compiled=True)[1]
    assert kernel.seconds == pytest.approx(bytes_s(300, cluster()))


@pytest.mark.parametrize(("sending", "step"), [(0.4, 2.2), (4.0, 4.25)])
def test_async_tp_hides_gathers_and_scatters_behind_their_matmuls(sending: float, step: float) -> None:
    """In 4 pieces beside matmuls of 1 s: the first piece of a gather and the last of a scatter are what is left exposed;
    longer than the matmul, all but a piece of the matmul overlaps."""
    names = ("all_gather", "reduce_scatter")
    there, back = (Event("tp", "forward", "dtensor", name, 0, 4) for name in names)
    collective = op("collective", writes=[(1, 0)], event=there)
    gathered = [Kernel("collective", "all_gather", sending, collective), wait_for(1), work(1.0)]
    scattered = [
        work(1.0),
        Kernel("collective", "reduce_scatter", 0.4, op("collective", writes=[(2, 0)], event=back)),
        wait_for(2),
    ]
    part = [*gathered, *scattered] if sending < 1 else gathered
    waited, beside = (
        replay([part, []], 1, cluster(), 8, compiled=True, in_chunks=chunks)["step"]
        for chunks in (False, True)
    )
    assert beside < waited
    assert beside == pytest.approx(step)
    slow = [work(1.0), scattered[1]._replace(seconds=4.0), wait_for(2)]  # from a quarter of the matmul on
    assert replay([slow, []], 1, cluster(), 8, compiled=True, in_chunks=True)["step"] == pytest.approx(4.25)


def test_pieces_of_a_gather_take_nothing_from_the_matmul_beside_them() -> None:
    """Copy engines move them; NCCL's kernels take a quarter of the device."""
    event = Event("tp", "forward", "dtensor", "all_gather", 0, 4)
    sent = Kernel("collective", "all_gather", 1.0, op("collective", writes=[(1, 0)], event=event))
    part, slow = [sent, work(2.0)], cluster(overlap_slowdown=0.25)
    by_nccl, in_pieces = (
        replay([part, []], 1, slow, 8, compiled=True, in_chunks=chunks)["gemm"] for chunks in (False, True)
    )
    assert (by_nccl, in_pieces) == pytest.approx((2.25, 2.0))


@pytest.mark.parametrize(("ranks", "switched", "joined_by_pairs"), [(8, 100, 100), (2, 100, 100 / 7)])
def test_without_a_switch_few_devices_have_few_links(
    ranks: int, switched: float, joined_by_pairs: float
) -> None:
    """Of 8 devices, each with a link to every other, 2 have one of the 7."""
    moved = 1_000_000_000
    for links, bandwidth in (
        (cluster(), switched),
        (dataclasses.replace(cluster(), has_switch=False), joined_by_pairs),
    ):
        seconds = collective_s("all_gather", moved, Route(ranks, ranks), links)
        assert seconds == pytest.approx(moved * (ranks - 1) / ranks / (bandwidth * 1e9))


@pytest.mark.parametrize("name", CLUSTERS)
def test_every_cluster_states_every_number_with_its_source(name: str) -> None:
    plain = read_option("cluster", name)
    found = parse_cluster(plain)
    assert found.name == name
    assert set(plain["numbers"]) == set(NUMBERS)
    assert all(number.source for number in found.numbers.values())
    assert (conf_dir() / "cluster" / f"{name}.yaml").read_text().startswith("# ")


def number(
    value: object, kind: object = "guessed", source: object = "a test", **more: object
) -> dict[str, object]:
    return {"value": value, "kind": kind, "source": source, **more}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        *(({"memory_gb": plain}, "memory_gb") for plain in (None, 80, [80], number(80, unit="GiB"))),
        ({"nvlink": number(1)}, "nvlink"),
        ({5: number(1)}, "5"),
        ({"memory_gb": number(1, kind=["felt"])}, "memory_gb.kind"),
        ({"memory_gb": number(1, source=None)}, "memory_gb.source"),
        *(
            ({name: number(value)}, f"{name}.value")
            for name, values in {
                "bandwidth_gb_s": (
                    0,
                    -1,
                    3.35e12,
                    1e-320,
                    float("nan"),
                    float("inf"),
                    True,
                    None,
                    "3350 GB/s",
                    [1, 2],
                    [],
                ),
                "gemm_efficiency": (67, 0, 1e-320),
                "memory_gb": (1e-320, 81_559, 85e9),
                "memory_reserved_gb": (42.4, 1000),
                "peak_tflops_bfloat16": (1e-320, -1),
                "compute_units": (0.5,),
                "launch_us": (-1,),
                "attention_tflops_forward": (
                    300,
                    [300],
                    [300, 400],
                    [1] * 7,
                    [1] * 9,
                    [0, *[1] * 5],
                    [float("nan"), *[1] * 7],
                    [[1]] * 6,
                    [],
                ),
            }.items()
            for value in values
        ),
    ],
)
def test_a_number_that_is_none_is_refused_by_its_name(change: dict[str, Any], field: str) -> None:
    plain = read_option("cluster", CLUSTERS[0])
    plain["numbers"] |= change
    with pytest.raises(ConfigError) as refused:
        parse_cluster(plain)
    assert refused.value.field == f"cluster.numbers.{field}"


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("device", (None, "", ["H100"])),
        ("devices_per_host", (0, -8, 2.5, True, "8", float("nan"))),
        ("devices_per_node", (0, -4, 2.5, 3, 128)),
        ("hosts", (0, 1.5, "two")),
        ("shared_cores", (0, 1e-320, "two")),
        ("has_switch", ("no", None)),
        ("checked", ("by no one", 5, [1])),
        ("numbers", (None, [], "none", [1])),
        ("device_per_host", (8,)),
    ],
)
def test_a_cluster_that_is_none_is_refused_by_its_key(name: str, values: tuple[object, ...]) -> None:
    plain = read_option("cluster", CLUSTERS[0])
    for value in values:
        with pytest.raises(ConfigError) as refused:
            parse_cluster({**plain, name: value})
        assert refused.value.field == f"cluster.{name}"


def test_a_bare_number_of_a_cluster_is_told_the_key_that_takes_it() -> None:
    plain = read_option("cluster", CLUSTERS[0])
    plain["numbers"]["inter_gb_s"] = 25
    with pytest.raises(
        ConfigError, match="=25: not a value with its kind and its source: bandwidth"
    ) as refused:
        parse_cluster(plain)
    assert refused.value.fix == {"cluster.numbers.inter_gb_s": None, "cluster.numbers.inter_gb_s.value": 25}
    with pytest.raises(ConfigError, match="devices_per_host=0: out of bounds; "):
        parse_cluster(read_option("cluster", CLUSTERS[0]) | {"devices_per_host": 0})


def test_a_world_that_a_cluster_cannot_hold_is_refused() -> None:
    check_world(cluster(), 4)
    check_world(cluster(), 24)
    with pytest.raises(ConfigError, match=r"^world_size=12: .*a multiple of 8$"):
        check_world(cluster(), 12)
    with pytest.raises(ConfigError, match=r"^cluster=null"):
        parse_cluster({})


@pytest.mark.parametrize(("memory_gb", "rows"), [(100, 12), (10, 8), (7, 4), (2, 0)])
def test_rows_that_fit_divide_a_rank_s_share(memory_gb: float, rows: int) -> None:
    """2 GB that stay and 1 per row of 12, of a share of 24 rows."""
    cfg = config("model=llama2_debug", "train.global_batch_size=48", "train.micro_batch_size=12")
    held = {"parameters": 2 * 10**9, "activations": 10**10, "other": 2 * 10**9}
    here, sizes = cluster(memory_gb=memory_gb), MeshSizes(dp_shard=2)
    found = Prediction(here, sizes, cfg, {"step": 1.0}, 1.0, [], held)
    assert rows_that_fit(found) == rows


def test_the_range_of_a_step_follows_from_its_parts_and_the_cluster() -> None:
    """Of 2 s a half in matmuls, a twentieth each in waits along an axis and elementwise; 7 % are the site's."""
    seconds = {"step": 2.0, "gemm": 1.0, "elementwise": 0.1, "sent/tp/forward/dtensor/all_gather": 1.0}
    seconds |= {f"exposed/tp/{phase}/dtensor/all_gather": 0.05 for phase in ("forward", "backward")}
    spread = math.sqrt(0.07**2 + (0.5 * 0.07) ** 2 + (0.05 * 0.3) ** 2 + (0.05 * 0.15) ** 2)
    guessed, cfg = cluster(), config("model=llama2_debug")
    numbers = {**guessed.numbers, "gemm_efficiency": Number(0.5, SourceKind.datasheet, "a test")}
    stated, checked = (
        dataclasses.replace(guessed, numbers=numbers),
        dataclasses.replace(guessed, checked=("x",)),
    )
    for here, gb, wide in (
        (checked, 93, spread),
        (stated, 93, 1.2 * spread),
        (guessed, 93, 0.1),
        (checked, 94, 0.1),  # tight
        (checked, 101, spread),  # does not fit
    ):
        found = Prediction(here, MeshSizes(), cfg, seconds, 1.0, [], {"parameters": gb * 10**9})
        assert found.fits == (gb < 101)
        assert (found.low_s, found.high_s) == pytest.approx((2 * (1 - wide), 2 * (1 + wide)))
        assert found.time_s["exposed tp"] == pytest.approx(0.1)
