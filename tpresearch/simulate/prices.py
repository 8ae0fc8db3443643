"""Time of each op on a device: matmuls by tiles and waves, attention by length, everything else by its bytes.

Seconds of a kernel alone on the device. FLOPs are torch's (torch.utils.flop_counter): 2 m n k of a matmul, causal
attention by half of its square, its backward 2.5 times its forward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from tpresearch.config.errors import ConfigError
from tpresearch.simulate.cluster import LENGTHS, Cluster
from tpresearch.simulate.trace import Op

TILES = ((256, 128, 1.0), (128, 256, 1.0), (128, 128, 1.06), (128, 64, 1.25), (64, 64, 1.6))
"""Rows and columns of a tile, and by how much its work takes longer than the best one's (cuBLAS and CUTLASS offer these
shapes; the factors are those of CUTLASS's profiler, rounded)."""
SPLIT_DEPTH = 512
"""Least inner dim of the parts into which a matmul of few tiles is split along it, so that more units work (split-K)."""
SPLIT_LONGER = 1.15
"""By how much its work then takes longer."""
NARROW_CONVOLUTION = 16
"""Outputs per group below which a convolution, such as a depthwise one, does not use matmul units, and is bound by its bytes."""
COPIES = ("all_gather_copy_in", "split_with_sizes_copy", "chunk_cat", "_foreach_copy_")
"""FSDP's copies, which are never fused."""
ADAMW_BFLOAT16 = 0.65
"""Share of its float32 rate at which torch's fused AdamW moves bytes on a GPU where weights and moments are bfloat16 (two H200:
2.28 TB/s in steps of 8B parameters; 2.97 and 3.47 in float32; experiments/gpu)."""
ADDING_MATMUL = "add_product_"
"""`tpresearch.parallel.gradient_sums`: a matmul that reads what it adds to, while it computes. (A step's first need not.)"""
COMPILED_ADAMW = "adamw_"
"""`tpresearch.train.adamw.adamw_`, which moves bytes as other compiled kernels do."""
PLAIN_ADAMW = "adamw_ in plain torch"
PLAIN_ADAMW_PASSES = 46
"""Float32 numbers that it reads and writes per element, one op after the other (counted in `adamw._update_tensor`)."""
PASSES_OF_HALVES = 22
"""More, where the weight is joined and split (counted in `halves.py`)."""
DTYPES = {1: "float8", 2: "bfloat16", 4: "float32", 8: "float64"}


FLOAT8_EFFICIENCY = 0.925
"""Share of `gemm_efficiency` that a matmul in float8 reaches: on an H100 those of a training step are 1.85 times as fast as in
bfloat16, at twice the peak (experiments/published, fitted on the float8 rows of torchtitan, AWS and llm-foundry)."""


def op_s(op: Op, cluster: Cluster) -> float:
    """Seconds of one op that is not a collective."""
    if op.kind == "gemm":
        alone = gemm_s(op.shape, op.element, cluster)
        return max(alone, bytes_s(moved_bytes(op), cluster)) if op.name == ADDING_MATMUL else alone
    if op.kind == "convolution":
        multiplies = op.shape[2] >= NARROW_CONVOLUTION
        multiplying = _multiplying_s(op.shape, op.element, cluster) if multiplies else 0.0
        return max(multiplying, bytes_s(moved_bytes(op), cluster))
    if op.kind == "attention":
        return max(attention_s(op.shape, op.element, cluster), bytes_s(moved_bytes(op), cluster))
    if op.kind == "optimizer" and op.name not in (COMPILED_ADAMW, PLAIN_ADAMW):
        rate = _bandwidth(cluster, "optimizer_efficiency")
        return moved_bytes(op) / (rate * (ADAMW_BFLOAT16 if op.element == 2 and not cluster.is_cpu else 1.0))
    if op.name in COPIES:
        return moved_bytes(op) / _bandwidth(cluster, "copy_efficiency") + cluster["kernel_us"] * 1e-6
    return bytes_s(moved_bytes(op), cluster)


def gemm_s(shape: tuple[int, ...], element: int, cluster: Cluster) -> float:
    """A matmul of (products, m, n, k), by whichever tile finishes its last wave first, or by its bytes."""
    products, m, n, k = shape
    made = max(element, 2)  # a matmul in float8 writes bfloat16
    moving = products * ((m * k + k * n) * element + m * n * made) / _bandwidth(cluster)
    return max(_multiplying_s(shape, element, cluster), moving) + cluster["kernel_us"] * 1e-6


def _multiplying_s(shape: tuple[int, ...], element: int, cluster: Cluster) -> float:
    products, m, n, k = shape
    units, begun = cluster["compute_units"], cluster["gemm_half_depth"]
    work = math.inf
    for rows, columns, longer in TILES if units > 1 else ((1, 1, 1.0),):
        tiles = products * math.ceil(m / rows) * math.ceil(n / columns)
        depths = math.ceil(tiles / units) * units * (k + begun)
        if tiles < units:
            split = max(tiles * (k + begun), units * (SPLIT_DEPTH + begun))
            depths = min(depths, SPLIT_LONGER * split)
        work = min(work, depths * rows * columns * longer)
    rate = _peak(element, cluster) * 1e12 * cluster["gemm_efficiency"]
    if element == 1:
        rate *= FLOAT8_EFFICIENCY
    return 2.0 * work / rate


def attention_s(shape: tuple[int, ...], element: int, cluster: Cluster) -> float:
    rows, heads, _, length, keys, width, backward, causal = shape
    flops = 4.0 * rows * heads * length * keys * width * (0.5 if causal else 1.0) * (2.5 if backward else 1.0)
    table = cluster.table(f"attention_tflops_{'backward' if backward else 'forward'}")
    rate = _interpolated(table, length) * 1e12
    if width < 128:
        rate *= cluster["attention_narrow_heads"] ** math.log2(128 / width)
    if element > 2 and (narrow := cluster["peak_tflops_bfloat16"]):  # on matmul units of the wider type
        rate *= _peak(element, cluster) / narrow
    blocks = rows * heads * math.ceil(length / 128)
    busy = min(1.0, blocks / (cluster["compute_units"] * (1 if backward else 2)))
    return flops / (rate * max(busy, 0.1)) + cluster["kernel_us"] * 1e-6


def bytes_s(moved: float, cluster: Cluster) -> float:
    return moved / _bandwidth(cluster) + cluster["kernel_us"] * 1e-6


def moved_bytes(op: Op) -> float:
    """Bytes that an op reads and writes, where that differs from the sizes of its tensors."""
    read = sum(size for _, size in op.reads)
    written = sum(size for _, size in op.writes)
    match op.name:
        case "embedding" | "gather" | "index_select" | "index":
            return 2.0 * written
        case "index_put_" | "index_add_":
            return 3.0 * sum(size for _, size in op.reads[1:])
        case "scatter_" | "scatter_add_":  # indices are int64
            values = op.reads[1][1] / 8 * op.element
            return sum(size for _, size in op.reads[1:]) + values * (1 if op.name == "scatter_" else 2)
        case "copy_" | "split_with_sizes_copy" | "chunk_cat" | "_foreach_copy_":
            return float(read)
        case "zeros_like" | "ones_like" | "full_like" | "new_zeros":
            # Only the shape is taken from the tensor that they are given.
            return float(written)
        case "nll_loss_forward":
            return float(sum(size for _, size in op.reads[1:]))
        case "all_gather_copy_in":
            return 2.0 * op.writes[0][1]
    if op.name == COMPILED_ADAMW:
        # Weight, gradient and moments are read, then scalars; a copy is only written, other than a remainder.
        _, gradient, *_ = sizes = [size for _, size in op.reads]
        return 2.0 * sum(sizes) - gradient - (0 if _updates_halves(op) else max(sizes[4:]))
    if op.name == ADDING_MATMUL:
        return float(sum(size for _, size in op.reads[:3]) + op.reads[0][1])
    if op.name == PLAIN_ADAMW:
        passes = PLAIN_ADAMW_PASSES + (PASSES_OF_HALVES if _updates_halves(op) else 0)
        return op.reads[0][1] / op.element * 4.0 * passes
    if op.kind == "optimizer":  # parameter, gradient and two moments are read, all but the gradient written
        return read * 7 / 4
    if op.name.startswith("_foreach") and not op.writes:
        return 2.0 * read
    return float(read + written)


def _updates_halves(op: Op) -> bool:
    """Whether what follows AdamW's moments is the remainder of a weight in bfloat16, as large as that, and not a copy of one in
    float32, half as large."""
    return op.reads[4][1] == op.reads[0][1]


def fused_bytes(ops: Sequence[Op], last_read: dict[int, int], end: int) -> int:
    """Bytes that ops in one kernel move: what they read from outside, and what is read after them, or is a sum of gradients,
    to which backward adds in place and which the update reads.

    Args:
        last_read: of each storage, the place in the step where it is read last. end: the place of these ops.
    """
    made: dict[int, int] = {}
    read: dict[int, int] = {}
    sums: set[int] = set()
    for op in ops:
        for number, size in op.reads:
            if number not in made:
                read[number] = max(read.get(number, 0), size)
        made |= dict(op.writes)
        if op.phase == "backward" and op.name == "add_":
            sums |= {number for number, _ in op.writes}
    kept = (size for number, size in made.items() if number in sums or last_read.get(number, end + 1) > end)
    return sum(read.values()) + sum(kept)


def _peak(element: int, cluster: Cluster) -> float:
    """The cluster's peak in 1e12 FLOP/s for elements of this many bytes.

    Raises:
        ConfigError: where the cluster has none.
    """
    name = f"peak_tflops_{DTYPES.get(element, 'float32')}"
    if not cluster[name]:
        why = "the step multiplies matrices of that dtype"
        raise ConfigError(f"cluster.numbers.{name}.value", 0, why, "a number above 0")
    return cluster[name]


def _bandwidth(cluster: Cluster, share: str = "bandwidth_efficiency") -> float:
    return cluster["bandwidth_gb_s"] * 1e9 * cluster[share]


def _interpolated(table: Sequence[float], length: int) -> float:
    """Linear in the logarithm of the length; below the table's first, by the root of the length."""
    lengths = LENGTHS[-len(table) :]
    if length <= lengths[0]:
        return table[0] * max(length / lengths[0], 0.04) ** 0.5
    for i in range(len(table) - 1):
        if length <= lengths[i + 1]:
            return table[i] + (table[i + 1] - table[i]) * math.log2(length / lengths[i])
    return table[-1]
