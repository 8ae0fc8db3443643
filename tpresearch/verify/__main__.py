"""`python -m tpresearch.verify`: compare each plan with one process, from the same weights on the same batches."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from tpresearch.checkpoint.resume import not_resuming
from tpresearch.config import Config, ConfigError
from tpresearch.config.axes import AXIS_NAMES
from tpresearch.launch import Run, World, entrypoint
from tpresearch.track.record import write_json

if TYPE_CHECKING:
    from tpresearch.verify.plans import Result  # it imports torch, for which a refused config should not wait

HEADINGS = {
    "initial weights": "init",
    "loss": "loss",
    "grad norm": "norm",
    "gradients": "grads",
    "weights": "weights",
    "between ranks": "ranks",
    "held-out loss": "held",
}


class VerifyPreflight(NamedTuple):
    cfg: Config
    plans: dict[str, list[Config]]
    """For each plan one config per optimizer."""


def preflight(cfg: Config, world: World) -> VerifyPreflight:
    if world.size > 1:
        why, legal = "it starts its own ranks", "a start by python, without torchrun"
        raise ConfigError("WORLD_SIZE", world.size, why, legal, nproc=1)
    not_resuming(cfg)
    from tpresearch.verify.plans import check_moments, check_plan, configs_by_plan, with_device_chosen

    try:
        plans = configs_by_plan(cfg, sys.argv[1:])
        for cfgs in with_device_chosen(plans).values():
            for each in cfgs:
                check_moments(each)
            check_plan(cfgs[0])
    except ConfigError as error:
        if error.nproc:  # the ranks of a plan that is run alone
            error.fix = {**dict.fromkeys(error.fix), "verify.world_size": error.nproc}
            error.nproc = None
        raise
    return VerifyPreflight(cfg, plans)


@entrypoint("verify", preflight=preflight)
def main(job: VerifyPreflight, run: Run) -> None:
    from tpresearch.verify.plans import verify_plans

    cfg = job.cfg
    results = verify_plans(job.plans, cfg)
    record: dict[str, Any] = {
        "model": cfg.model.name,
        "dtype": str(cfg.train.dtype),
        "world_size": cfg.verify.world_size,
        "steps": cfg.verify.steps,
        "passed": all(result.passed for result in results),
        "results": [dataclasses.asdict(result) | {"passed": result.passed} for result in results],
    }
    path = run.folder / "verify.json"
    write_json(path, record)
    print_table(results, path)
    if not record["passed"]:
        sys.exit(1)


def print_table(results: list[Result], path: Path) -> None:
    """Print one row per plan and optimizer; quantities out of tolerance are marked, with details below."""
    console = Console(highlight=False)
    titles = ("plan on mesh", "with", *HEADINGS.values(), "")
    columns = (Column(title, no_wrap=True) for title in titles)
    table = Table(*columns, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)  # within 80 characters
    for result in results:
        cells = [_cell(result, quantity) for quantity in HEADINGS]
        plan = f"{result.plan:<7} {'x'.join(map(str, result.mesh.values()))}"
        verdict = "ok" if result.passed else "[red]FAIL[/red]"
        table.add_row(plan, result.optimizer, *cells, verdict)
    console.print(table)
    console.print(f"mesh: ranks along {' x '.join(AXIS_NAMES)}")
    for note in dict.fromkeys(result.note for result in results if result.note):
        console.print(note, markup=False)
    _print_integers(console, results)
    for result in results:
        if result.error:
            console.print(f"{result.plan} {result.optimizer}: did not run: {result.error}", markup=False)
        for quantity in result.out:
            worst = result.worst[quantity]
            where = f" of {worst.parameter}" if worst.parameter else ""
            where += f" at step {worst.step}" if worst.step is not None else ""
            said = f"{result.plan} {result.optimizer}: {quantity}{where} is off by {worst.error:.1e}"
            console.print(said, markup=False)
    within = results[0].tolerance if results else 0
    verdict = "each plan computes what one process does" if all(r.passed for r in results) else "MISMATCH"
    console.print(
        f"{verdict} (relative error up to {within:.0e}; initial weights and replicated values bitwise)\nrecord {path}",
        markup=False,
    )


def _print_integers(console: Console, results: list[Result]) -> None:
    """The result of verify.integers: each kind of matmul and its difference."""
    chosen = [result for result in results if result.integers is not None]
    if not chosen:
        return
    titles = ("plan", "matmul on integers", "rule", "output", "input gradient", "weight gradient", "")
    table = Table(*(Column(title, no_wrap=True) for title in titles))
    for result in chosen:
        for exact in result.integers or ():
            verdict = "ok" if exact.passed else "[red]FAIL[/red]"
            table.add_row(
                result.plan, exact.layer, exact.rule, *(f"{n:g}" for n in exact.differences), verdict
            )
    console.print(table)


def _cell(result: Result, quantity: str) -> str:
    if quantity not in result.worst:
        return "–"
    text = f"{result.worst[quantity].error:.0e}" if result.worst[quantity].error else "0"
    return f"[red]{text}[/red]" if quantity in result.out else text


if __name__ == "__main__":
    main()
