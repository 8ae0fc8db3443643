"""Which quantity reveals each wrong plan, and which plans a loss curve would not reveal.

python experiments/mutants/measure.py      # writes results.csv (record.py says where); several minutes on two cores
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "tests")]
import numpy as np
from mutants.catalogue import BOTH, MUTANTS, Mutant, run
from numpy.typing import NDArray
from record import made_by, place, write_rows
from rich.progress import track
from support.composed import config, corpus, in_two_parts

from tpresearch.config.schema import Dtype
from tpresearch.data.rows import PackedCorpus
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.reference import reference
from tpresearch.verify.trace import RunTrace, compare, out_of_tolerance

HERE = Path(__file__).parent
STEPS = 12
SETTINGS = (
    "optimizer=adamw",
    "optimizer.lr=1e-2",
    "train.dtype=float64",
    "train.eval_rows=11",
    "train.clip_grad_norm=0.2",
    "schedule.warmup_steps=2",
    f"train.steps={STEPS}",
)
VISIBLE_LOSS_DIFFERENCE = 0.05
"""A curve that strays by less than this share of the right one's descent, at every step, looks like it."""


def easy() -> PackedCorpus:
    """Rows of 16 tokens that mostly count up: there is something to learn within a dozen steps, and no two are alike."""
    drawn = np.random.default_rng(3)
    random = corpus()

    def rows(count: int, length: int) -> NDArray[np.uint16]:
        found = drawn.integers(0, 16, (count, length))
        counts_up = drawn.random((count, length)) < 0.75
        for position in range(1, length):
            after = (found[:, position - 1] + 1) % 16
            found[:, position] = np.where(counts_up[:, position], after, found[:, position])
        return (16 * found).astype(np.uint16)  # spread over the vocabulary, and so over its shards

    return dataclasses.replace(random, train=rows(*random.train.shape), held_out=rows(*random.held_out.shape))


def descent(trace: RunTrace) -> float:
    return trace.steps[0].loss - trace.steps[-1].loss


def row_of(mutant: Mutant, model: str, ranks: Ranks, right: RunTrace) -> dict[str, object]:
    """One run under AdamW, as most are trained: the first quantity that is out, and how far the loss strays."""
    cfg = in_two_parts(config(f"model={model}", f"parallel={mutant.plan}", *SETTINGS), mutant.ranks)
    found = ranks.run(mutant.ranks, run, mutant.name, cfg, easy(), STEPS)[0]
    where: dict[str, object] = {
        "model": model,
        "fault": mutant.name,
        "plan": mutant.plan,
        "ranks": mutant.ranks,
    }
    if isinstance(found, str):
        why = found.replace(f"{HERE.parents[1]}/", "")  # a path of this machine's
        return where | {"quantity_out": f"did not run: {why}", "a_loss_curve_shows_it": True}
    assert isinstance(found, RunTrace)
    worst = compare(found, right)
    out = out_of_tolerance(worst, Dtype.float64)
    strays = max(abs(a.loss - b.loss) for a, b in zip(found.steps, right.steps, strict=True)) / descent(right)
    first = mutant.caught_by if mutant.caught_by in out else next(iter(out), "nothing")
    return where | {
        "quantity_out": first,
        "its_error": f"{worst[first].error:.1e}" if first in out else "",
        "loss_strays_by": f"{strays:.1e}",
        "a_loss_curve_shows_it": strays > VISIBLE_LOSS_DIFFERENCE,
    }


def main() -> None:
    ranks, rows = Ranks(), []
    cases = [(model, mutant) for model in BOTH for mutant in MUTANTS if model in mutant.models]
    right = {
        model: reference(config(f"model={model}", "parallel=none", *SETTINGS), easy(), STEPS)
        for model in BOTH
    }
    for model, mutant in track(cases, description="mutants"):
        rows.append(row_of(mutant, model, ranks, right[model]))
    write_rows(place(HERE) / "results.csv", rows, heading=made_by(HERE))
    missed = [row for row in rows if not row["a_loss_curve_shows_it"]]
    print(
        f"{len(rows)} wrong plans, {sum(row['quantity_out'] != 'nothing' for row in rows)} caught; "
        f"{len(missed)} of them keep the loss, for {STEPS} steps, within {VISIBLE_LOSS_DIFFERENCE:.0%} of the right one's descent "
        f"({', '.join(f'{name} {descent(trace):.2f}' for name, trace in right.items())} nats)"
    )


if __name__ == "__main__":
    main()
