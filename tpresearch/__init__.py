"""tpresearch: understand and compare tensor, sequence, fully-sharded and 2D parallelism.

    cfg = tpresearch.load("model=llama2_debug", "parallel=tp")    the typed config of these overrides
    tpresearch.compile_plan(cfg, world_size=4)                    what each rank holds and sends
    job = tpresearch.build(cfg)                                   this rank's model, mesh and step
    tpresearch.runs("outputs"), tpresearch.metrics("outputs")     records of runs, as pandas DataFrames

The rest is imported when one of these names is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tpresearch import interrupt

if TYPE_CHECKING:
    from tpresearch.api import build, compile_plan, load, metrics, runs

interrupt.exit_on_interrupt()

__all__ = ["build", "compile_plan", "load", "metrics", "runs"]


def __dir__() -> list[str]:
    return [*globals(), *__all__]  # for completion


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tpresearch' has no attribute '{name}'")
    from tpresearch import api

    return getattr(api, name)
