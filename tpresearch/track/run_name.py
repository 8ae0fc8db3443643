"""The readable name of a run: its model and the layout of its ranks."""

from __future__ import annotations

from collections.abc import Mapping

from tpresearch.config.axes import AXES_OF_DATA_PLAN, TENSOR
from tpresearch.config.choices import Float8, WeightDtype
from tpresearch.config.schema import ParallelConfig
from tpresearch.config.training import TrainConfig


def run_name(model: str, parallel: ParallelConfig, sizes: Mapping[str, int], train: TrainConfig) -> str:
    """`llama2_tiny/fsdp2-tp2`: the model, then each part of the plan with its size; `single` for one process.

    A 1D plan is `sp` or `tp`. With a data plan both are written `tp`, as is customary. Narrower weights and matmuls than
    most runs have follow: `llama2_7b/fsdp8-bf16weights-float8rowwise`.

    Args:
        sizes: ranks along each mesh axis; a missing axis has size 1.
    """
    counts = "x".join(str(sizes.get(axis.name, 1)) for axis in AXES_OF_DATA_PLAN[parallel.data])
    data = f"{parallel.data}{counts}" if counts else ""
    tensor = f"{'tp' if data else parallel.tensor}{sizes.get(TENSOR.name, 1)}" if parallel.tensor else ""
    weights = "bf16weights" if train.weights is WeightDtype.bfloat16 else ""
    float8 = f"float8{train.float8}" if train.float8 is not Float8.none else ""
    layout = "-".join(part for part in (data, tensor) if part) or "single"
    return f"{model}/{'-'.join(part for part in (layout, weights, float8) if part)}"
