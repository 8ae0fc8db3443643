"""Which quantity shows each wrong plan, and which of them a loss curve would not have shown.

python experiments/mutants/measure.py      # writes results.csv beside this file; several minutes on two cores
"""

from __future__ import annotations

import csv
import datetime
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "tests")]

from composed import config, corpus, in_two_parts  # noqa: E402
from mutants.catalogue import MUTANTS, Mutant, run  # noqa: E402
from rich.progress import track  # noqa: E402

from tpresearch.config.schema import Dtype  # noqa: E402
from tpresearch.launch.world import World  # noqa: E402
from tpresearch.verify.compare import compare, tolerance  # noqa: E402
from tpresearch.verify.ranks import Ranks  # noqa: E402
from tpresearch.verify.trace import Trace, trace  # noqa: E402

STEPS = 6
SETTINGS = (
    "optimizer=adamw",
    "train.dtype=float64",
    "train.eval_rows=11",
    "schedule.warmup_steps=2",
    "train.steps=6",
)
CLIPPED = "train.clip_grad_norm=0.2"
VISIBLE = 0.01
"""A curve that is nowhere further than this from the right one, relatively, looks like it."""
COLUMNS = (
    "model",
    "fault",
    "plan",
    "ranks",
    "first_quantity_out",
    "its_error",
    "greatest_error_of_the_loss",
    "a_loss_curve_shows_it",
)


def row_of(mutant: Mutant, model: str, ranks: Ranks, right: Trace) -> dict[str, object]:
    """One run under AdamW, as most are trained: the first quantity that is out, and how far the loss strays."""
    cfg = in_two_parts(config(f"model={model}", f"parallel={mutant.plan}", *SETTINGS, CLIPPED), mutant.ranks)
    found = ranks.run(mutant.ranks, run, mutant.name, cfg, corpus(), STEPS)[0]
    where = {"model": model, "fault": mutant.name, "plan": mutant.plan, "ranks": mutant.ranks}
    if isinstance(found, str):
        return where | {"first_quantity_out": f"did not run: {found}", "a_loss_curve_shows_it": True}
    assert isinstance(found, Trace)
    worst = compare(found, right)
    out = {q: w for q, w in worst.items() if not w.error <= tolerance(q, Dtype.float64)}
    first = mutant.caught_by if mutant.caught_by in out else next(iter(out), "nothing")
    return where | {
        "first_quantity_out": first,
        "its_error": f"{out[first].error:.1e}" if first in out else "",
        "greatest_error_of_the_loss": f"{worst['loss'].error:.1e}",
        "a_loss_curve_shows_it": worst["loss"].error > VISIBLE,
    }


def main() -> None:
    ranks, rows = Ranks(), []
    cases = [
        (model, mutant)
        for model in ("toy_mlp", "llama2_debug")
        for mutant in MUTANTS
        if model in mutant.models
    ]
    right = {
        model: trace(config(f"model={model}", "parallel=none", *SETTINGS, CLIPPED), corpus(), World(), STEPS)
        for model in ("toy_mlp", "llama2_debug")
    }
    try:
        for model, mutant in track(cases, description="mutants"):
            rows.append(row_of(mutant, model, ranks, right[model]))
    finally:
        ranks.close()
    with (HERE / "results.csv").open("w", newline="") as file:
        file.write(
            f"# python experiments/mutants/measure.py, torch {torch.__version__}, {datetime.date.today()}\n"
        )
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    missed = [row for row in rows if not row["a_loss_curve_shows_it"]]
    print(
        f"{len(rows)} wrong plans, {sum(row['first_quantity_out'] != 'nothing' for row in rows)} caught; "
        f"{len(missed)} of them keep the loss within {VISIBLE:.0%} of the right one for {STEPS} steps"
    )


if __name__ == "__main__":
    main()
