"""losses.png from losses.csv: the 2D script's loss on random tokens, right and with each mistake that changes it."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

sys.path.append(str(Path(__file__).parents[1]))
from record import place, read_rows

HERE = Path(__file__).parent
SHOWN = {
    "none": ("nothing wrong", "#000000", "o"),
    "keep_gradients": ("gradients kept", "#d55e00", "s"),
    "weights_per_rank": ("weights of each rank's own", "#0072b2", "^"),
    "overlapping_batches": ("overlapping batches", "#009e73", "D"),
}
VOCABULARY = 32_000


def main() -> None:
    rows = [row for row in read_rows(HERE, "losses.csv") if row["experiment"] == "seed_2d"]
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(7.5, 3.8))
    for switch, (label, colour, marker) in SHOWN.items():
        points = [(int(row["step"]), float(row["loss"])) for row in rows if row["switch"] == switch]
        axes.plot(*zip(*points, strict=True), color=colour, marker=marker, ms=5, lw=1.3, label=label)
    entropy = math.log(VOCABULARY)
    axes.axhline(entropy, color="#777777", lw=1, ls=(0, (4, 3)), zorder=0)
    note = f"entropy of the tokens, ln 32,000 = {entropy:.2f}: the least that unseen rows allow"
    axes.annotate(
        note, (10, entropy), (0, -12), textcoords="offset points", ha="right", color="#555555", fontsize=9
    )
    axes.set(
        xlabel="step",
        ylabel="loss (nats a token)",
        title="The 2D script on random tokens",
        xticks=range(1, 11),
    )
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(place(HERE) / "losses.png", dpi=150)


if __name__ == "__main__":
    main()
