"""The verdict on the terminal: plan by quantity, the greatest error of each, and where."""

from __future__ import annotations

from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from tpresearch.config.axes import AXIS_NAMES
from tpresearch.verify.plans import Result

HEADINGS = {
    "initial weights": "init",
    "loss": "loss",
    "grad norm": "norm",
    "gradients": "grads",
    "weights": "weights",
    "between ranks": "ranks",
    "held-out loss": "held",
}


def print_table(results: list[Result], path: Path) -> None:
    """Print one row per plan and optimizer; what is out of tolerance is marked, and said in full below."""
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
    verdict = "each plan computes what one process does" if all(r.passed for r in results) else "MISMATCH"
    console.print(
        f"{verdict} (relative error up to {within:.0e}; initial weights, and what ranks hold alike, to the bit)\nrecord {path}",
        markup=False,
    )


def _print_integers(console: Console, results: list[Result]) -> None:
    """What was asked for by verify.integers: each kind of matmul, and how far from bitwise equal."""
    chosen = [result for result in results if result.integers is not None]
    if not chosen:
        return
    titles = ("plan", "matmul on integers", "rule", "output", "input gradient", "weight gradient", "")
    table = Table(*(Column(title, no_wrap=True) for title in titles))
    for result in chosen:
        for exact in result.integers or ():
            numbers = (exact.output, exact.input_gradient, exact.weight_gradient)
            verdict = "ok" if exact.passed else "[red]FAIL[/red]"
            table.add_row(result.plan, exact.layer, exact.rule, *(f"{n:g}" for n in numbers), verdict)
    console.print(table)


def _cell(result: Result, quantity: str) -> str:
    if quantity not in result.worst:
        return "–"
    text = f"{result.worst[quantity].error:.0e}" if result.worst[quantity].error else "0"
    return f"[red]{text}[/red]" if quantity in result.out else text
