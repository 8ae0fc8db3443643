"""The plot: bytes between the hosts in a step, counted and from the ledger."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from two_hosts.formulas import TUTORIAL, each_way

ROWS = 32
"""The global batch of the left half, in rows of 256 tokens."""
PLANS = {
    "fsdp_tp": ("tp inside a host, FSDP across", "#0072B2", "o"),
    "hsdp": ("FSDP inside a host, replicas across", "#009E73", "s"),
    "fsdp": ("FSDP over all four ranks", "#E69F00", "^"),
    "tp": ("tp over all four ranks", "#D55E00", "D"),
}
BARS = {
    "ledger_ring_bytes": ("ledger, by the ring formulas", "#C9D6E2"),
    "ledger_gloo_bytes": ("ledger, as gloo sends it", "#7FA3C2"),
    "payload_bytes": ("counted on the interface, without headers", "#23415C"),
}

Rows = list[dict[str, str]]


def draw(rows: Rows, path: Path) -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 4.9), width_ratios=[1.1, 1])
    draw_bars(left, rows)
    draw_lines(right, rows)
    figure.tight_layout(w_pad=2.5)
    figure.savefig(path, dpi=150)


def mean_mb(rows: Rows, parallel: str, batch: int, column: str) -> float:
    """Each way, over steps and directions."""
    found = [int(r[column]) for r in rows if (r["parallel"], int(r["rows"])) == (parallel, batch)]
    return statistics.fmean(found) / 1e6


def draw_bars(axes: Axes, rows: Rows) -> None:
    height = 0.26
    for index, parallel in enumerate(PLANS):
        for nth, (column, (label, colour)) in enumerate(BARS.items()):
            value, y = mean_mb(rows, parallel, ROWS, column), index + (nth - 1) * height
            axes.barh(y, value, height * 0.92, color=colour, label=label if index == 0 else None)
            axes.annotate(
                f"{value:.1f}", (value, y), (3, 0), textcoords="offset points", va="center", fontsize=8
            )
    names = [f"{name}\n{what}" for name, (what, *_) in PLANS.items()]
    axes.set_yticks(range(len(PLANS)), names)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="MB a step, each way", title=f"One batch of {ROWS} x 256 tokens, 2 hosts of 2 ranks")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.14), ncols=1)


def draw_lines(axes: Axes, rows: Rows) -> None:
    batches = [4, 8, 16, 32, 64, 128]
    for parallel, (_, colour, marker) in PLANS.items():
        line = [
            each_way([f"parallel={parallel}", f"train.global_batch_size={n}", *TUTORIAL], 2, gloo=True)
            for n in batches
        ]
        axes.plot([n * 256 for n in batches], [value / 1e6 for value in line], color=colour, lw=1.3)
        counted = sorted({int(row["rows"]) for row in rows if row["parallel"] == parallel})
        axes.plot(
            [n * 256 for n in counted],
            [mean_mb(rows, parallel, n, "payload_bytes") for n in counted],
            color=colour,
            marker=marker,
            ms=7,
            lw=0,
            mec="white",
            label=parallel,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [n * 256 for n in batches]
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks])
    axes.set_yticks([30, 100, 300], ["30", "100", "300"])
    axes.minorticks_off()
    axes.set(
        xlabel="tokens a step",
        ylabel="MB a step, each way",
        title="Counted (marks), by gloo's formulas (lines)",
    )
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9)
