"""Prints results.csv as the table of the README: one row per fault, both models side by side.

python experiments/mutants/table.py
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))
from record import read_rows

HEADER = "| fault | plan | caught by | error | loss strays by | seen in the loss |"


def main() -> None:
    rows = read_rows(Path(__file__).parent, "results.csv")
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
