"""Prints results.csv as the table of the README: one row per fault, both models side by side.

python experiments/mutants/table.py
"""

from __future__ import annotations

import csv
from pathlib import Path

HEADER = "| fault | plan | caught by | error | loss strays by | seen in the loss |"


def main() -> None:
    with (Path(__file__).parent / "results.csv").open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    print(HEADER, "|" + "---|" * (HEADER.count("|") - 1), sep="\n")
    for fault in dict.fromkeys(row["fault"] for row in rows):
        mine = [row for row in rows if row["fault"] == fault]
        seen = ("yes" if row["a_loss_curve_shows_it"] == "True" else "no" for row in mine)
        cells = [
            fault,
            f"`{mine[0]['plan']}`",
            " / ".join(dict.fromkeys(row["quantity_out"].partition(":")[0] for row in mine)),
            " / ".join(row["its_error"] or "–" for row in mine),
            " / ".join(row["loss_strays_by"] or "–" for row in mine),
            " / ".join(dict.fromkeys(seen)),
        ]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
