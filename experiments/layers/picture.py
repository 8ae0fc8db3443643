"""The placements of the four cases as a drawing: one colour per rank, grey if replicated."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44")
WHOLE = "#dddddd"

# Of each case, the matrices from left to right: (name, width, height, how it is split, what comes before it).
Matrix = tuple[str, float, float, str, str]
DRAWN: dict[str, list[Matrix]] = {
    "column-wise:  split B by columns, gather the columns of A": [
        ("X", 2, 1, "whole", ""),
        ("B", 4, 2, "columns", "·"),
        ("X B on each rank", 4, 1, "columns", "="),
        ("A", 4, 1, "whole", "all-gather →"),
    ],
    "row-wise:  split B by rows and X by columns, sum the parts": [
        ("X", 2, 1, "columns", ""),
        ("B", 4, 2, "rows", "·"),
        ("a part of the sum on each rank", 4, 1, "layers", "="),
        ("A", 4, 1, "whole", "all-reduce →"),
    ],
    "combined:  nothing is sent between the two, one all-reduce at the end": [
        ("X", 2, 1, "whole", ""),
        ("B", 4, 2, "columns", "·"),
        ("relu(X B)", 4, 1, "columns", "="),
        ("C", 2, 4, "rows", "·"),
        ("A", 2, 1, "whole", "all-reduce →"),
    ],
    "sequence parallel:  the same, with tokens (rows of X and A) sharded outside; an all-reduce in two halves": [
        ("X", 2, 1, "rows", ""),
        ("X", 2, 1, "whole", "all-gather →"),
        ("B", 4, 2, "columns", "·"),
        ("relu(X B)", 4, 1, "columns", "="),
        ("C", 2, 4, "rows", "·"),
        ("A", 2, 1, "rows", "reduce-scatter →"),
    ],
}


def draw(path: Path, ranks: int) -> None:
    figure, axes = plt.subplots(len(DRAWN), 1, figsize=(12, 11.5), height_ratios=[3, 3, 5, 5])
    for axis, (title, matrices) in zip(axes, DRAWN.items(), strict=True):
        left = 0.0
        for name, width, height, split, before in matrices:
            left += 0.18 * len(before) + 0.5
            axis.text(left - 0.25, 0, before, ha="right", va="center", fontsize=11)
            _matrix(axis, left, width, height, split, ranks)
            axis.text(left + width / 2, height / 2 + 0.12, name, ha="center", va="bottom", fontsize=10)
            left += width + 0.3
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlim(0, 27)
        axis.set_ylim(-max(m[2] for m in matrices) / 2 - 0.2, max(m[2] for m in matrices) / 2 + 0.8)
        axis.set_aspect("equal")
        axis.axis("off")
    handles = [Rectangle((0, 0), 1, 1, color=COLOURS[rank]) for rank in range(ranks)]
    handles.append(Rectangle((0, 0), 1, 1, color=WHOLE))
    labels = [f"rank {rank}" for rank in range(ranks)] + ["whole on every rank"]
    figure.legend(handles, labels, loc="lower center", ncols=ranks + 1, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _matrix(axis: Axes, left: float, width: float, height: float, split: str, ranks: int) -> None:
    if split == "whole":
        axis.add_patch(Rectangle((left, -height / 2), width, height, facecolor=WHOLE, edgecolor="black"))
        return
    for rank in range(ranks):
        if split == "columns":
            box = (left + rank * width / ranks, -height / 2), width / ranks, height
        elif split == "rows":
            box = (left, height / 2 - (rank + 1) * height / ranks), width, height / ranks
        else:  # whole in shape, and only a part of the sum in value: sheets upon each other
            box = (left + 0.12 * rank, -height / 2 - 0.12 * rank), width, height
        axis.add_patch(Rectangle(*box, facecolor=COLOURS[rank], edgecolor="white"))
