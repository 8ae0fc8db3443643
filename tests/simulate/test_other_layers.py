"""Layers that Llama2 has not: convolutions, complex numbers, bags of embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.composed import config
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tpresearch.config.validate import validate
from tpresearch.launch.composition import read_option
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.simulate.device_memory import DeviceMemory
from tpresearch.simulate.fake_ranks import fake_mesh
from tpresearch.simulate.prices import bytes_s, moved_bytes, op_s
from tpresearch.simulate.recorder import Recorder
from tpresearch.simulate.trace import Op

H100 = parse_cluster(read_option("cluster", "h100_dgx"))


def run(model: nn.Module, *given: Tensor) -> Tensor:
    output: Tensor = model(*given)
    return (torch.view_as_real(output) if output.is_complex() else output).sum()


def recorded(make: Callable[[], nn.Module], *given: Tensor) -> list[Op]:
    """Forward and backward on fake tensors."""
    with (
        fake_mesh(validate(config("parallel=none"), 1)) as mesh,
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
    ):
        fake = make()
        memory = DeviceMemory(fake, torch.optim.SGD(fake.parameters(), lr=1.0))
        recorder = Recorder(mesh, fake, [], memory, on_cpu=False)
        inputs = [mode.from_tensor(tensor) for tensor in given]
        with memory, recorder.recording():
            with recorder.phase("forward"):
                loss = run(fake, *inputs)
            with recorder.phase("backward"):
                loss.backward()
    return recorder.micro_batches[0]


CONVOLUTIONS = {
    "text": (lambda: nn.Conv1d(32, 48, 3, padding=1), (2, 32, 50)),
    "pixels": (lambda: nn.Conv2d(16, 64, 3, stride=2), (2, 16, 20, 20)),
    "groups": (lambda: nn.Conv2d(16, 64, 3, groups=4), (2, 16, 20, 20)),
    "transposed": (lambda: nn.ConvTranspose1d(32, 48, 4, stride=2), (2, 32, 50)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("learns", [True, False])
def test_a_convolution_takes_its_flops(kind: str, learns: bool) -> None:
    """Those of forward for each gradient too; the weight is multiplied with each output, or with each input if transposed."""
    make, size = CONVOLUTIONS[kind]
    given, layer = torch.ones(size, requires_grad=learns), make()
    weight = layer.get_parameter("weight")
    times = (given if kind == "transposed" else layer(given)).numel()
    forward, backward = (op for op in recorded(make, given) if op.kind == "convolution")
    assert math.prod(forward.shape) == times * weight[0].numel()
    assert math.prod(backward.shape) == (2 if learns else 1) * math.prod(forward.shape)


def test_a_large_convolution_is_bound_by_its_flops_and_a_depthwise_one_by_its_bytes() -> None:
    moved, shape = (((0, 2 << 24),), ((1, 2 << 24),)), (1, 1 << 16, 256, 2304)
    large = Op("forward", "convolution", "convolution", *moved, 2, shape, None, -1)
    flops = 2 * math.prod(large.shape)
    assert op_s(large, H100) == pytest.approx(flops / H100.peak_flops(config().train.dtype.bfloat16), rel=0.6)
    assert op_s(large, H100) > 3 * bytes_s(moved_bytes(large), H100)
    depthwise = large._replace(shape=(256, 1 << 16, 1, 4))
    assert op_s(depthwise, H100) == bytes_s(moved_bytes(depthwise), H100)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(24, 40, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def test_a_matmul_of_complex_numbers_is_four_of_real_ones() -> None:
    forward, *_ = (
        op for op in recorded(Complex, torch.ones(8, 24, dtype=torch.complex64)) if op.kind == "gemm"
    )
    assert forward.element == 4  # and not that of a matmul in float64
    assert math.prod(forward.shape) == 4 * 8 * 24 * 40


def test_a_bag_reads_the_rows_of_its_indices() -> None:
    ops = recorded(lambda: nn.EmbeddingBag(100_000, 8, mode="sum"), torch.zeros(4, 5, dtype=torch.int64))
    forward = next(op for op in ops if "embedding_bag" in op.name)
    assert forward.reads[0][1] == 4 * 5 * 8 * 4
