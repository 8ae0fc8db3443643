"""`parallel.compile=true` and bfloat16 through the real command: the same science, within their precision."""

from __future__ import annotations

import pytest
from support.marks import exhaustive
from support.trainings import ROWS, Train, Trained

pytestmark = pytest.mark.cli

# Evaluation would be compiled too; the compiler's own helpers cost more than they save on so little.
COMPILED = ("parallel.compile=true", "train.eval_rows=0", "logger=none")
ONE_THREAD = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


def check_same(compiled: Trained, eager: Trained) -> None:
    for name in ("train/loss", "train/grad_norm"):
        assert compiled.column(name) == pytest.approx(eager.column(name), rel=1e-5, abs=0), name
    assert compiled.json("ledger.json")["measured"] == eager.json("ledger.json")["measured"]
    assert compiled.column("comm/bytes_per_step") == eager.column("comm/bytes_per_step")


@pytest.mark.parametrize("model", ["toy_mlp", exhaustive("llama2_debug")])
def test_compiled_tensor_parallelism_is_the_eager_one(trained: Train, model: str) -> None:
    """Each kernel costs the C++ compiler a second: a block of the toy has half of the Llama's."""
    words = (f"model={model}", "parallel=tp", *COMPILED)
    check_same(trained(2, *words, **ONE_THREAD), trained(2, *words, "parallel.compile=false"))


@pytest.mark.exhaustive
def test_compiled_fsdp_is_the_eager_one(trained: Train, run_fsdp: Trained) -> None:
    check_same(trained(2, *ROWS, *COMPILED, **ONE_THREAD), run_fsdp)


def test_bfloat16_runs_near_float32_under_the_2d_plan(trained: Train, run_2d: Trained) -> None:
    half = trained(4, "parallel=fsdp_tp", "train.dtype=bfloat16", "logger=none")
    assert half.column("train/loss") == pytest.approx(run_2d.column("train/loss"), rel=5e-3)
    assert half.column("train/loss") != run_2d.column("train/loss")
    assert half.json("summary.json")["dtype"] == "bfloat16"
    sent = {
        name: {
            (entry["axis"], entry["phase"], entry["collective"]): entry["sent_bytes"]
            for entry in run.json("ledger.json")["measured"]
        }
        for name, run in (("half", half), ("single", run_2d))
    }
    gathered = ("dp_shard", "forward", "all_gather")
    assert 2 * sent["half"][gathered] == sent["single"][gathered]  # weights are gathered in two bytes
    reduced = ("dp_shard", "backward", "reduce_scatter")
    assert sent["half"][reduced] == sent["single"][reduced]  # and gradients summed in four
