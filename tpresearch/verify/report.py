"""The verdict on the terminal: plan by quantity, the greatest error of each, and where."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Column, Table

from tpresearch.verify.plans import Result

HEADINGS = ("init", "loss", "norm", "grads", "weights", "held-out")
QUANTITIES = ("initial weights", "loss", "grad norm", "gradients", "weights", "held-out loss")


def print_table(results: list[Result], path: Path) -> None:
    """Print one row a plan and optimizer; what is out of tolerance is marked, and said in full below."""
    console = Console(highlight=False)
    table = Table(*(Column(title, no_wrap=True) for title in ("plan", "optimizer", *HEADINGS, "")))
    for result in results:
        cells = [_cell(result, quantity) for quantity in QUANTITIES]
        table.add_row(result.plan, result.optimizer, *cells, "ok" if result.passed else "[red]out[/red]")
    console.print(table)
    for result in results:
        if result.error:
            console.print(f"{result.plan} {result.optimizer}: did not run: {result.error}", markup=False)
        for quantity in result.out:
            worst = result.worst[quantity]
            where = "".join(
                [
                    f" of {worst.parameter}" * bool(worst.parameter),
                    f" at step {worst.step}" * (worst.step is not None),
                ]
            )
            console.print(
                f"{result.plan} {result.optimizer}: {quantity}{where} is off by {worst.error:.1e}",
                markup=False,
            )
    within = results[0].tolerance if results else 0
    verdict = "each plan computes what one process does" if all(r.passed for r in results) else "NOT the same"
    console.print(
        f"{verdict} (relative error up to {within:.0e}; initial weights to the bit)\nrecord {path}",
        markup=False,
    )


def _cell(result: Result, quantity: str) -> str:
    if quantity not in result.worst:
        return "–"
    text = f"{result.worst[quantity].error:.0e}" if result.worst[quantity].error else "0"
    return f"[red]{text}[/red]" if quantity in result.out else text
