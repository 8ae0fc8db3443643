"""Fake tensors that remember are torch's own, op by op and step by step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.composed import config
from support.counted_steps import PLANS
from support.marks import exhaustive
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from tpresearch.config.validate import validate
from tpresearch.simulate import fake_step, remembered_shapes
from tpresearch.simulate.remembered_shapes import RememberingFakeTensorMode


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*(shape or (6, 4)), dtype=dtype)


def numbers() -> Tensor:
    return torch.arange(6)


def beside(tensor: Tensor, op: Callable[[Tensor], Any]) -> tuple[Tensor, Any]:
    """What the op gives, and what it was given, which it may have written to or share."""
    return tensor, op(tensor)


OPS: dict[str, Callable[[], Any]] = {
    "new": lambda: (matrix() + 1, matrix() @ matrix(4, 3), torch.cat([matrix(), matrix(2, 4)])),
    "of one dtype and of another": lambda: (numbers() * 2, numbers() * 2.0, numbers() * True, numbers() / 2),
    "strides": lambda: (matrix().t() + 1, matrix().t().contiguous(), matrix().t()[1:] * 2),
    "other strides": lambda: (matrix(4, 4) + 1, matrix(4, 4).t() + 1, matrix(8, 4)[::2] + 1, matrix(4, 8)[:, ::2] + 1),
    "views": lambda: (matrix().view(4, 6), matrix().t(), matrix()[2:, 1], matrix().expand(3, 6, 4), matrix().detach()),
    "views of views": lambda: (matrix()[2:].view(-1)[3:], matrix().as_strided((2, 2), (1, 4), 3).t()),
    "several views": lambda: (matrix().split(2), matrix().unbind(), matrix().chunk(4), matrix().split([1, 5])),
    "a view that is another dtype": lambda: matrix(6, 4).view(torch.int32),
    "a view of nothing": lambda: (matrix(0, 4).view(4, 0), matrix(0, 4).sum(), matrix(0, 4).t() + 1),
    "views that share": lambda: beside(matrix(), lambda t: (t.view(4, 6), t[1:], t.split(2), t.detach(), t.reshape(24))),
    "a view that is not called one": lambda: beside(matrix(), lambda t: torch.ops.aten._unsafe_view.default(t, [4, 6])),
    "complex": lambda: (
        torch.view_as_complex(matrix(6, 2)),
        torch.view_as_real(matrix(dtype=torch.complex64)),
        matrix(dtype=torch.complex64).conj(),
        matrix(dtype=torch.complex64).clone(),
        matrix(dtype=torch.complex64).conj().clone(),
        matrix(dtype=torch.complex64).conj() * 2,
        matrix(dtype=torch.complex64).conj().t(),
        matrix(dtype=torch.complex64).conj().imag * 2,
    ),
    "several": lambda: (matrix().max(0), matrix().topk(2), torch.native_layer_norm(matrix(), (4,), None, None, 1e-5)),
    "several with names": lambda: nn.functional.nll_loss(matrix(), numbers() // 2),
    "lists": lambda: (torch._foreach_norm([matrix(), matrix(3)]), torch._foreach_mul([matrix()], 2.0)),
    "in place": lambda: (
        beside(matrix(), lambda t: t.add_(1)),
        beside(matrix(), lambda t: t[1:].mul_(2)),
        beside(matrix(), lambda t: t.t_()),
        beside(matrix(), lambda t: t.unsqueeze_(0)),
        beside(matrix(), lambda t: t.copy_(matrix(dtype=torch.float64))),
        beside(matrix(), lambda t: torch._foreach_add_([t], 1.0)),
        beside(matrix(), lambda t: torch.add(t, 1, out=t)),
        beside(matrix(), lambda t: t.resize_(2, 3)),
    ),
    "made": lambda: (torch.zeros(3), torch.full((2,), 7), torch.full((2,), 7.0), torch.scalar_tensor(1), torch.arange(0)),
    "like": lambda: (torch.zeros_like(matrix().t()), torch.empty_like(matrix(), dtype=torch.bfloat16), matrix().new_zeros(2)),
    "a known number": lambda: torch.tensor(3) + 1,
    "what depends on a known number": lambda: (torch.tensor(3) + 1).item(),
    "a parameter": lambda: (nn.Parameter(matrix()).detach(), torch.zeros_like(nn.Parameter(matrix()))),
    "drawn": lambda: (torch.rand_like(matrix()), nn.functional.dropout(matrix(), 0.5), matrix().normal_()),
    "attention": lambda: nn.functional.scaled_dot_product_attention(heads := matrix(2, 2, 8, 4), heads, heads, is_causal=True),
    "a gradient": lambda: torch.autograd.grad(((a := matrix().requires_grad_()) * a.sum()).mean(), a),
}  # fmt: skip


def described(values: Any) -> list[Any]:
    """All that can be told of tensors that hold nothing, and which of them share a storage."""
    storages: dict[int, int] = {}
    found: list[Any] = []
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            place = storages.setdefault(storage._cdata, len(storages))
            layout = value.shape, value.stride(), value.storage_offset(), value.dtype, value.device
            found.append((layout, place, storage.nbytes(), value.is_conj(), value.is_neg(), type(value)))
        else:
            found.append(value)
    return [type(values), *found]


@pytest.mark.parametrize("kind", OPS)
def test_an_op_gives_what_torch_gives_the_first_time_and_later(kind: str) -> None:
    remembered_shapes._remembered.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        expected = described(OPS[kind]())
    FakeTensorMode.cache_clear()
    for _ in range(3):
        with RememberingFakeTensorMode(allow_non_fake_inputs=True):
            assert described(OPS[kind]()) == expected


def test_a_dtype_that_is_the_default_is_not_remembered_as_another() -> None:
    with RememberingFakeTensorMode(allow_non_fake_inputs=True):
        for dtype in (torch.float32, torch.float64, torch.float32):
            torch.set_default_dtype(dtype)
            try:
                found = [(numbers() / 2).dtype, torch.zeros(3).dtype, (numbers() * 2.5).dtype]
            finally:
                torch.set_default_dtype(torch.float32)
            assert found == [dtype] * 3


def test_a_view_of_a_freed_storage_leaves_it_freed() -> None:
    """FSDP frees gathered weights so, and torch's cache would bring their bytes back."""
    with RememberingFakeTensorMode(allow_non_fake_inputs=True):
        for _ in range(3):
            gathered = matrix()
            gathered.untyped_storage().resize_(0)
            assert gathered.view(4, 6).untyped_storage().nbytes() == 0


def test_an_op_that_is_refused_is_refused_again() -> None:
    with RememberingFakeTensorMode():
        for _ in range(2):
            with pytest.raises(RuntimeError, match="reduction dim"):
                matrix() @ matrix()
            with pytest.raises(RuntimeError, match="shape '\\[5, 5\\]' is invalid"):
                matrix().view(5, 5)


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ("fsdp_tp", "parallel.activation_checkpointing=selective train.loss_chunk=32"),
        exhaustive("hsdp_tp", "train.dtype=bfloat16"),
        *[exhaustive(plan, "parallel.activation_checkpointing=full") for plan, _ in PLANS],
    ],
)
def test_a_step_is_recorded_as_on_torchs_fake_tensors(
    plan: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(
        "model=llama2_debug", f"parallel={plan}", "train.global_batch_size=32", "data.seq_len=64", *words.split()
    )  # fmt: skip
    sizes = validate(cfg, dict(PLANS)[plan])
    remembered_shapes._remembered.clear()
    found = [fake_step.record(cfg, sizes) for _ in range(2)]
    assert remembered_shapes._remembered
    monkeypatch.setattr(fake_step, "RememberingFakeTensorMode", FakeTensorMode)
    expected = fake_step.record(cfg, sizes)
    for trace in found:
        assert trace == expected
        assert trace.changes == expected.changes
