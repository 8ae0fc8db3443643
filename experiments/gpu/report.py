"""Predictions and measurements, as the tables of README.md: ours by arithmetic, then the simulator's.

python experiments/gpu/report.py [RESULTS.jsonl ...]        default: those recorded in results/; RECORD=1 writes README.md
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from gpu.rows import read

HERE = Path(__file__).parent
BEGIN, END = "<!-- table: experiments/gpu/report.py -->", "<!-- end of table -->"
SIMULATED = "<!-- simulated: experiments/gpu/report.py -->"
CARDS = {"h200_dgx": "h200", "h100_dgx": "h100", "h200_calibrated": "h200", "h100_calibrated": "h100"}
"""Of each cluster of simulated.csv, the card whose results it is compared with."""


def card_of(rows: list[dict[str, Any]]) -> str | None:
    """h200 or h100, from the name that the card gives itself."""
    name = next((row["card"] for row in rows if "card" in row), "")
    return next((kind for kind in ("h200", "h100") if kind in name.lower()), None)


def dated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a call, with its day."""
    return [{"date": rows[0].get("date", ""), **row} for row in rows]


def measured(rows: list[dict[str, Any]], id: str, what: str) -> str:
    """The value of a prediction's quantity, or why there is none."""
    if id == "matmul sustained":
        found = [row["flops"] / row["us"] / 1e6 for row in rows if row.get("op") == id and "us" in row]
        return f"{found[-1]:,.0f}" if found else "not run"
    of_id = last_day([row for row in rows if row.get("id") == id and "event" not in row])
    done = [row for row in of_id if "error" not in row]
    if not done:
        return str(of_id[-1]["error"]) if of_id else "not run"
    if what == "peak memory":
        return in_turn(f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "-" for row in done)
    speeds = in_turn(f"{row['perf/tokens_per_second']:,.0f}" for row in done)
    shares = in_turn(f"{row['perf/mfu']:.1%}" for row in done if "perf/mfu" in row)
    return f"{speeds} ({shares} MFU)" if shares else speeds


def last_day(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of the last day on which there was a measurement: the code changes."""
    return [row for row in rows if row["date"] == max(row["date"] for row in rows)]


def in_turn(values: Iterable[str]) -> str:
    """What several cards, or calls, measured; what was the same once."""
    return ", ".join(dict.fromkeys(values))


def table(results: list[list[dict[str, Any]]]) -> str:
    """Markdown: a row per prediction, a column of predictions, bars and measurements per kind of card."""
    by_card = {
        card: [row for rows in results if card_of(rows) == card for row in dated(rows)]
        for card in ("h200", "h100")
    }
    lines = [
        "| setting | quantity | H200 predicted | bar | measured | H100 80 GB predicted | measured | the prediction is from |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with (HERE / "predictions.csv").open() as file:
        for row in csv.DictReader(file):
            cells = [
                *(row["id"], f"{row['what']}, {row['unit']}", shown(row["h200"]), shown(row["bar_h200"])),
                *(measured(by_card["h200"], row["id"], row["what"]), shown(row["h100"])),
                *(measured(by_card["h100"], row["id"], row["what"]), row["from"]),
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def simulated_table(results: list[list[dict[str, Any]]], predictions: list[dict[str, str]]) -> str:
    """Markdown: a row per setting and cluster of simulated.csv and measurement of the last day on such a card; errors relative to what was
    measured; then a line over the rows that were first measured after they were predicted, and one over those of calibrated
    clusters."""
    lines = [
        "| setting | cluster | step predicted, s (range) | measured, s | error | tok/s predicted | measured | peak predicted, GB | measured, GB | error | known before |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    blind: list[tuple[float, bool]] = []
    calibrated: list[tuple[float, bool]] = []
    for predicted in predictions:
        card = CARDS[predicted["cluster"]]
        found = [
            row
            for rows in results
            if card_of(rows) == card
            for row in dated(rows)
            if row.get("id") == predicted["id"] and "event" not in row
        ]
        is_calibrated = predicted["cluster"].endswith("calibrated")
        known = any(row["date"] < predicted["date"] for row in found)
        for measured in last_day(found):
            cells = [*simulated_cells(predicted, measured), "yes" if known and not is_calibrated else ""]
            lines.append("| " + " | ".join([predicted["id"], predicted["cluster"], *cells]) + " |")
            if "step_s" in measured and predicted["step_s"] and (is_calibrated or not known):
                low, step, high = (float(predicted[key]) for key in ("low", "step_s", "high"))
                error = step / measured["step_s"] - 1, low <= measured["step_s"] <= high
                (calibrated if is_calibrated else blind).append(error)
    return "\n".join([*lines, "", errors_text("Blind", blind), "", errors_text("Calibrated", calibrated)])


def simulated_cells(predicted: dict[str, str], measured: dict[str, Any]) -> list[str]:
    """Step time, tokens per second and peak memory, each predicted and measured, with the errors of the first and last."""
    seconds, peak = measured.get("step_s"), measured.get("peak_bytes")
    was = (
        str(measured["error"]) if seconds is None else f"{seconds:.3f}",
        "-" if seconds is None else f"{measured['perf/tokens_per_second']:,.0f}",
        "-" if peak is None else f"{peak / 1e9:.1f}",
    )
    if not predicted["step_s"]:
        return [predicted["reason"], was[0], "-", "-", was[1], "-", was[2], "-"]
    step, held = float(predicted["step_s"]), float(predicted["memory_bytes"])
    return [
        f"{step:.3f} ({float(predicted['low']):.2f} to {float(predicted['high']):.2f})",
        *(was[0], "-" if seconds is None else f"{step / seconds - 1:+.1%}"),
        *(f"{int(predicted['tokens_per_s']):,}", was[1]),
        f"{held / 1e9:.1f}" + " (does not fit)" * bool(predicted["reason"]),
        *(was[2], "-" if peak is None else f"{held / peak - 1:+.1%}"),
    ]


def errors_text(rows: str, errors: list[tuple[float, bool]]) -> str:
    if not errors:
        return f"{rows}: none of these rows has been measured."
    sizes = [abs(error) for error, _ in errors]
    worst = max((error for error, _ in errors), key=abs)
    bias, inside = sum(error for error, _ in errors) / len(errors), sum(inside for _, inside in errors)
    return (
        f"{rows}: step time of {len(errors)} rows: mean error {sum(sizes) / len(sizes):.1%}, max {worst:+.1%}, "
        f"bias {bias:+.1%}; {inside} of {len(errors)} within the stated range."
    )


def read_simulated() -> list[dict[str, str]]:
    """What foresee.py has written, if anything."""
    if not (HERE / "simulated.csv").exists():
        return []
    with (HERE / "simulated.csv").open() as file:
        return list(csv.DictReader(file))


def shown(number: str) -> str:
    if not number:
        return "-"
    return f"{int(number):,}" if number.isdigit() else number


def main() -> None:
    paths = [Path(word) for word in sys.argv[1:]] or sorted((HERE / "results").glob("*.jsonl"))
    results = [read(path) for path in paths]
    predictions = read_simulated()
    for begin, text in ((BEGIN, table(results)), (SIMULATED, simulated_table(results, predictions))):
        print(text, end="\n\n")
        if os.environ.get("RECORD") == "1":
            readme = HERE / "README.md"
            before, rest = readme.read_text().split(begin)
            readme.write_text(f"{before}{begin}\n{text}\n{END}{rest.split(END, 1)[1]}")


if __name__ == "__main__":
    main()
