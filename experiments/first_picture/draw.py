"""One short training under eight plans, and a picture of it: are the loss curves the same?

    python experiments/first_picture/draw.py [overrides for every run]

Runs `torchrun ... train.py` once a plan, then writes curves.csv, summary.csv and curves.png beside itself and
prints the table of README.md.
"""

from __future__ import annotations

import csv
import itertools
import math
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from tpresearch.track.record import read_metrics, read_summary
from tpresearch.track.shown import bytes_text, count_text

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
JOB = ["experiment=first_picture"]

LAST_DIGIT = 2.0**-21
"""Between neighbouring float32 numbers from 4 to 8."""


@dataclass(frozen=True)
class Plan:
    name: str
    ranks: int
    colour: str
    marker: str


# Okabe and Ito's colours, told apart by every kind of colour vision; the markers tell them apart in grey too.
PLANS = [
    Plan("none", 1, "#c8c8c8", ""),
    Plan("ddp", 4, "#0072b2", "o"),
    Plan("tp", 4, "#d55e00", "s"),
    Plan("sp", 4, "#009e73", "^"),
    Plan("fsdp", 4, "#cc79a7", "D"),
    Plan("hsdp", 4, "#e69f00", "v"),
    Plan("fsdp_tp", 4, "#56b4e9", "P"),
    Plan("hsdp_tp", 4, "#000000", "X"),
]


def command(plan: Plan, folder: Path, extra: list[str]) -> list[str]:
    run_dir = f"hydra.run.dir={folder / plan.name}"
    launch = ["torchrun", "--standalone", f"--nproc-per-node={plan.ranks}", "train.py"]
    return [*launch, f"parallel={plan.name}", *JOB, *extra, run_dir]


def train_all(folder: Path, extra: list[str]) -> None:
    for plan in PLANS:
        words = command(plan, folder, extra)
        print(shlex.join(words), flush=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with (ROOT / folder / f"{plan.name}.out").open("w") as out:
            subprocess.run(words, cwd=ROOT, env=environment, stdout=out, stderr=out, check=True)


def write_results(folder: Path, extra: list[str]) -> None:
    """curves.csv, a row a step and plan, and summary.csv, a row a plan."""
    with (HERE / "curves.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["parallel", "step", "loss", "held_out_loss", "grad_norm"])
        for plan in PLANS:
            for row in read_metrics(ROOT / folder / plan.name):
                keys = ("train/step", "train/loss", "val/loss", "train/grad_norm")
                table.writerow([plan.name, *(row[key] for key in keys)])
    summaries = []
    for plan in PLANS:
        summary = read_summary(ROOT / folder / plan.name)
        words = [word for word in command(plan, folder, extra) if not word.startswith("hydra.run.dir")]
        summaries.append(
            {
                "parallel": plan.name,
                "ranks": summary["world_size"],
                "mesh": " ".join(f"{axis}={size}" for axis, size in summary["mesh"].items()) or "1",
                "held_out_loss": summary["val/loss"],
                "unigram_entropy": summary["unigram_entropy"],
                "bytes_sent_per_step": summary["comm/bytes_per_step"],
                "peak_memory_bytes": summary["memory/peak_bytes"],
                "tokens_per_second": round(summary["perf/tokens_per_second"]),
                "corpus_hash": summary["corpus_hash"],
                "date": datetime.now().date().isoformat(),
                "command": shlex.join(words),
            }
        )
    with (HERE / "summary.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(summaries[0]))
        table.writeheader()
        table.writerows(summaries)


def read_csv(name: str) -> list[dict[str, Any]]:
    with (HERE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def differences(curves: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(step, |loss - loss of one process|) for every plan."""
    one = {row["step"]: float(row["loss"]) for row in curves if row["parallel"] == "none"}
    return {
        plan.name: [
            (int(row["step"]), abs(float(row["loss"]) - one[row["step"]]))
            for row in curves
            if row["parallel"] == plan.name
        ]
        for plan in PLANS
    }


def print_table() -> None:
    worst = {name: max(gap for _, gap in gaps) for name, gaps in differences(read_csv("curves.csv")).items()}
    print(
        "| `parallel=` | mesh | held-out loss | furthest from one process | sent a step by rank 0 | peak memory of rank 0 | tokens/s |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in read_csv("summary.csv"):
        name = row["parallel"]
        cells = [
            f"`{name}`",
            row["mesh"],
            f"{float(row['held_out_loss']):.6f}",
            "–" if name == "none" else f"{worst[name]:.1e}",
            bytes_text(int(row["bytes_sent_per_step"])),
            bytes_text(int(row["peak_memory_bytes"])),
            count_text(int(row["tokens_per_second"])),
        ]
        print(f"| {' | '.join(cells)} |")


def draw() -> None:
    curves, summary = read_csv("curves.csv"), read_csv("summary.csv")
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=[1.15, 1])
    draw_losses(left, curves, float(summary[0]["unigram_entropy"]))
    draw_gaps(right, curves)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="lower center",
        ncols=len(labels),
        frameon=False,
        handletextpad=0.5,
        columnspacing=1.4,
    )
    figure.tight_layout(rect=(0, 0.07, 1, 1), w_pad=3)
    figure.savefig(HERE / "curves.png", dpi=150)


def draw_losses(axes: Axes, curves: list[dict[str, Any]], entropy: float) -> None:
    """All curves: one process as a broad line, each other plan as marks on it, each at steps of its own."""
    for index, plan in enumerate(PLANS):
        points = [(int(row["step"]), float(row["loss"])) for row in curves if row["parallel"] == plan.name]
        if plan.name == "none":
            axes.plot(
                *zip(*points, strict=True),
                color=plan.colour,
                lw=5,
                solid_capstyle="round",
                label="none (1 process)",
            )
        else:
            shown = points[index - 1 :: len(PLANS) - 1]
            axes.plot(*zip(*points, strict=True), color=plan.colour, lw=0.6)
            axes.plot(
                *zip(*shown, strict=True),
                color=plan.colour,
                marker=plan.marker,
                ms=5.5,
                lw=0,
                mec="white",
                mew=0.6,
                label=plan.name,
            )
    last = int(curves[-1]["step"])
    axes.axhline(entropy, color="#777777", lw=1, ls=(0, (4, 3)), zorder=0)
    axes.annotate(
        f"unigram entropy {entropy:.2f}",
        (last, entropy),
        (0, 4),
        textcoords="offset points",
        color="#555555",
        ha="right",
        fontsize=9,
    )
    held_out = {
        row["parallel"]: (int(row["step"]), float(row["held_out_loss"]))
        for row in curves
        if row["held_out_loss"]
    }
    step, loss = held_out["none"]
    axes.plot(step + 2.5, loss, marker="*", ms=13, color="#333333", mec="white", mew=0.7, lw=0, zorder=5)
    axes.annotate(
        f"held-out\n{loss:.2f}\nunder all {len(held_out)}",
        (step + 2.5, loss),
        (11, 0),
        textcoords="offset points",
        color="#333333",
        va="center",
        fontsize=9,
        annotation_clip=False,
    )
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="One training, eight plans")
    axes.margins(x=0.02)


def draw_gaps(axes: Axes, curves: list[dict[str, Any]]) -> None:
    """How far each plan has been from one process: the rounding of float32, and what training makes of it."""
    for index, plan in enumerate(PLANS[1:]):
        steps, gaps = zip(*differences(curves)[plan.name], strict=True)
        axes.plot(
            steps,
            [gap or math.nan for gap in itertools.accumulate(gaps, max)],
            color=plan.colour,
            lw=1.4,
            marker=plan.marker,
            ms=6,
            markevery=(2 + 2 * index, 14),
            mec="white",
            mew=0.6,
        )
    axes.axhline(LAST_DIGIT, color="#777777", lw=1, ls=(0, (4, 3)), zorder=0)
    axes.annotate(
        "last digit of a float32 loss",
        (steps[-1], LAST_DIGIT),
        (0, 4),
        textcoords="offset points",
        color="#555555",
        ha="right",
        fontsize=9,
    )
    axes.set_yscale("log")
    axes.set(
        xlabel="step",
        ylabel="|loss − loss of one process|, greatest so far",
        title="How far they are from one process",
        ylim=(2e-7, None),
    )
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.margins(x=0.02)


def main() -> None:
    extra = [word for word in sys.argv[1:] if word != "--draw-only"]
    if "--draw-only" not in sys.argv:
        folder = Path(f"outputs/first_picture/{datetime.now():%Y-%m-%d/%H-%M-%S}")
        (ROOT / folder).mkdir(parents=True)
        train_all(folder, extra)
        write_results(folder, extra)
    draw()
    print_table()


if __name__ == "__main__":
    main()
