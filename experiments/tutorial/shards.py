"""Which rank holds which part of every parameter, drawn from the compiled plan of any config: no ranks are started.

python experiments/tutorial/shards.py out=mlp.png model=toy_net parallel=tp world_size=4
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

import tpresearch
from tpresearch.config.axes import SHARD, TENSOR
from tpresearch.plan.compiler import sharded_dim
from tpresearch.train.preflight import Preflight

HERE = Path(__file__).parent
COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#999933", "#cc6633")
WHOLE = "#dddddd"
COLUMNS = 5
TALLEST = 4.8
"""Of what is drawn, in inches at most: sides grow by the logarithm of their length."""


def ranks_by_part(job: Preflight, fqn: str) -> dict[tuple[float, float, float, float], list[int]]:
    """(first row, first column, height, width) of a part, as shares of the parameter -> the ranks that hold it."""
    parameter = job.model.get_parameter(fqn)
    dim = sharded_dim(fqn, job.model, job.plan.rules)
    found: dict[tuple[float, float, float, float], list[int]] = {}
    sizes = job.sizes.values()
    for rank, place in enumerate(itertools.product(*map(range, sizes))):
        at = dict(zip(job.sizes.keys(), place, strict=True))
        row = column = 0.0
        height = width = 1.0
        if dim == 0:
            height /= job.sizes[TENSOR.name]
            row = at[TENSOR.name] * height
        elif dim == 1:
            width /= job.sizes[TENSOR.name]
            column = at[TENSOR.name] * width
        if parameter.dim() and job.sizes[SHARD.name] > 1:
            height /= job.sizes[SHARD.name]
            row += at[SHARD.name] * height
        found.setdefault((row, column, height, width), []).append(rank)
    return found


def draw(axes: Axes, job: Preflight, fqn: str, label: str) -> None:
    """The parameter as torch keeps it, [out, in] for a linear layer: rows down, columns to the right."""
    shape = tuple(job.model.get_parameter(fqn).shape)
    tall = 1 + math.log2(shape[0]) / 4
    wide = 1 + math.log2(shape[1]) / 4 if len(shape) > 1 else 0.5
    for (row, column, height, width), ranks in ranks_by_part(job, fqn).items():
        colour = WHOLE if len(ranks) == job.sizes.world > 1 else COLOURS[ranks[0] % len(COLOURS)]
        box = (column * wide, (1 - row - height) * tall), width * wide, height * tall
        axes.add_patch(Rectangle(*box, facecolor=colour, edgecolor="white", linewidth=1.5))
        middle = box[0][0] + box[1] / 2, box[0][1] + box[2] / 2
        text = "all" if len(ranks) == job.sizes.world > 1 else " ".join(map(str, ranks))
        axes.text(*middle, text, ha="center", va="center", fontsize=8)
    axes.text(0, tall + 0.15, f"{label}\n{'x'.join(map(str, shape))}", va="bottom", fontsize=7.5)
    axes.set_xlim(-0.1, max(wide, 2) + 0.1)
    axes.set_ylim(-0.1, TALLEST + 1.2)
    axes.set_aspect("equal")
    axes.axis("off")


def main() -> None:
    from record import place

    words = [word for word in sys.argv[1:] if not word.startswith("out=")]
    out = next((word.removeprefix("out=") for word in sys.argv[1:] if word.startswith("out=")), "shards.png")
    plan = tpresearch.compile_plan(tpresearch.load(*words))
    job = plan.job
    print(plan)
    names = [
        name for name, _ in job.model.named_parameters() if not name.startswith("layers.") or ".0." in name
    ]
    lines = math.ceil(len(names) / COLUMNS)
    figure, axes = plt.subplots(
        lines, COLUMNS, figsize=(1.9 * COLUMNS, 2.3 * lines), squeeze=False, layout="constrained"
    )
    for each in axes.flat:
        each.axis("off")
    for each, name in zip(axes.flat, names, strict=False):
        draw(each, job, name, name.replace("layers.0.", "each layer's\n"))
    figure.suptitle(f"{job.about}: the ranks that hold each part", fontsize=9)
    figure.savefig(place(HERE) / out, dpi=110)
    print(f"picture: {place(HERE) / out}")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main()
