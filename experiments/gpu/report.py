"""Predictions and measurements, as the table of README.md.

python experiments/gpu/report.py [RESULTS.jsonl ...]        default: those recorded in results/; RECORD=1 writes README.md
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path
from typing import Any

from rows import read

HERE = Path(__file__).parent
BEGIN, END = "<!-- table: experiments/gpu/report.py -->", "<!-- end of table -->"


def card_of(rows: list[dict[str, Any]]) -> str | None:
    """h200 or h100, from the name that the card gives itself."""
    name = next((row["card"] for row in rows if "card" in row), "")
    return next((kind for kind in ("h200", "h100") if kind in name.lower()), None)


def measured(rows: list[dict[str, Any]], id: str, what: str) -> str:
    """The value of a prediction's quantity, or why there is none."""
    if id == "matmul sustained":
        found = [row["flops"] / row["us"] / 1e6 for row in rows if row.get("op") == id and "us" in row]
        return f"{found[-1]:,.0f}" if found else "not run"
    of_id = [row for row in rows if row.get("id") == id and "event" not in row]
    if not of_id:
        return "not run"
    row = of_id[-1]
    if "error" in row:
        return str(row["error"])
    if what == "peak memory":
        return f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "-"
    mfu = row.get("perf/mfu")
    return f"{row['perf/tokens_per_second']:,.0f}" + (f" ({mfu:.1%} MFU)" if mfu else "")


def table(results: list[list[dict[str, Any]]]) -> str:
    """Markdown: a row per prediction, a column of predictions, bars and measurements per kind of card."""
    by_card = {
        card: [row for rows in results if card_of(rows) == card for row in rows] for card in ("h200", "h100")
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


def shown(number: str) -> str:
    if not number:
        return "-"
    return f"{int(number):,}" if number.isdigit() else number


def main() -> None:
    paths = [Path(word) for word in sys.argv[1:]] or sorted((HERE / "results").glob("*.jsonl"))
    text = table([read(path) for path in paths])
    print(text)
    if os.environ.get("RECORD") == "1":
        readme = HERE / "README.md"
        before, rest = readme.read_text().split(BEGIN)
        readme.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
