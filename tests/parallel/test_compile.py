"""`parallel.compile=true` compiles each block once, and every step after that runs compiled code, the counted one too."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from support.composed import config, corpus
from support.counted_steps import FAKE, PLANS
from support.marks import exhaustive
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition

from tpresearch.config.world import World
from tpresearch.ledger.entries import Expected, StepLedger
from tpresearch.ledger.formulas import expected_entries
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.train.assemble import assemble
from tpresearch.train.preflight import preflight
from tpresearch.train.watch import CountedStep

LAYERS = 12
"""More than dynamo's limit of recompilations, past which it would give up."""
STEPS = 6
KINDS = ("none", "selective", "full")
EVERY_DAY = {("none", "selective"), ("sp", "full")}
CASES = [
    (plan, world, kind) if (plan, kind) in EVERY_DAY else exhaustive(plan, world, kind)
    for plan, world in PLANS
    for kind in KINDS
]


class Compiler:
    """A backend that counts: graphs it was given, and calls into the code that it made of them."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.backend = aot_autograd(
            fw_compiler=self._made("forward"),
            bw_compiler=self._made("backward"),
            partition_fn=min_cut_rematerialization_partition,  # as inductor has it
        )

    def _made(self, direction: str) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            self.seen[f"{direction} graphs"] += 1

            def run(*args: Any) -> Any:
                self.seen[f"{direction} calls"] += 1
                return graph(*args)

            return make_boxed_func(run)

        return compiler

    def since(self, before: Counter[str]) -> dict[str, int]:
        return dict(self.seen - before)


@pytest.mark.parametrize(("plan", "world", "kind"), CASES)
def test_each_step_runs_compiled_code(
    plan: str, world: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler, compile_ = Compiler(), torch.compile
    torch._dynamo.reset()
    monkeypatch.setattr(
        torch, "compile", lambda f, **options: compile_(f, backend=compiler.backend, **options)
    )
    cfg = config(
        *("model=llama2_debug", f"model.n_layers={LAYERS}", f"parallel={plan}", "parallel.compile=true"),
        *(f"parallel.activation_checkpointing={kind}", "train.eval_rows=11"),
    )
    here = World(size=world, local_size=world)
    job, found = preflight(cfg, here), {}
    formulas = Expected(expected_entries(job.model, job.plan, cfg), {})
    with process_group(FAKE, here):
        mesh = build_mesh(job.sizes, "cpu")
        counting = CountedStep(mesh, formulas, STEPS, compiled=True)
        loop = assemble(job, mesh, FAKE, corpus(), [counting])
        for step in range(1, STEPS + 1):
            before = compiler.seen.copy()
            loop.step()
            found[step] = compiler.since(before)
            if step == STEPS - 1:
                loop.evaluate()
    again = 2 if kind == "full" and job.plan.rules else 1  # a compiled block is called again in backward
    each = {"forward calls": again * LAYERS, "backward calls": LAYERS}
    graphs = {"forward graphs": 1, "backward graphs": 1}
    assert found == {1: each | graphs, **dict.fromkeys(range(2, STEPS + 1), each)}
    assert isinstance(counting.counted, StepLedger)
    assert counting.counted.held == []
    if formulas.sent is not None:
        assert counting.counted.sent == formulas.sent
