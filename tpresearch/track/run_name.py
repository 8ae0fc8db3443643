"""The readable name of a run: its model and the layout of its ranks."""

from __future__ import annotations

from collections.abc import Mapping

from tpresearch.config.schema import DataPlan, ParallelConfig


def run_name(model: str, parallel: ParallelConfig, sizes: Mapping[str, int]) -> str:
    """`llama2_tiny/fsdp2-tp2`: the model, then each part of the plan with its size; `single` for one process.

    In a 1D plan `sp` is told from `tp`. Beside a data plan both are written `tp`, as the field does.

    Args:
        sizes: ranks along dp_replicate, dp_shard and tp; an axis that is not there counts 1.
    """
    replicate, shard, tp = (sizes.get(axis, 1) for axis in ("dp_replicate", "dp_shard", "tp"))
    data = {
        DataPlan.none: "",
        DataPlan.ddp: f"ddp{replicate}",
        DataPlan.fsdp: f"fsdp{shard}",
        DataPlan.hsdp: f"hsdp{replicate}x{shard}",
    }[parallel.data]
    tensor = f"{'tp' if data else parallel.tensor}{tp}" if parallel.tensor else ""
    return f"{model}/{'-'.join(part for part in (data, tensor) if part) or 'single'}"
