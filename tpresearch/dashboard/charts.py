"""Each panel of `track/panels.py` as a chart of W&B, over the names that runs give W&B."""

from __future__ import annotations

from typing import Any

import wandb_workspaces.reports.v2 as wr

from tpresearch.track.names import PARTS, X_AXIS
from tpresearch.track.panels import Kind, Panel

INSTEAD: dict[Kind, str] = {
    "difference": "Not in W&B, where an expression sees one run at a time; `python -m tpresearch.compare` draws it.",
    "scaling": "W&B, whose expressions see one run at a time, shows the speed itself: level where scaling is perfect.",
}
"""What is to be said where W&B cannot draw what the panel declares."""


def chart_of(panel: Panel) -> Any:
    """The chart that shows what the panel declares; for one that W&B cannot draw, a note that says what does."""
    title = panel.title
    metrics: list[Any] = logged_as(panel)
    match panel.kind:
        case "curve":
            return wr.LinePlot(title=title, x=X_AXIS, y=metrics, log_y=panel.log or None)
        case "bars" | "parts" | "ledger":
            return wr.BarPlot(title=title, metrics=metrics)
        case "pareto":
            y, x = metrics
            return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(y))
        case "scaling":
            x, y = "world_size", metrics[0]
            return wr.ScatterPlot(
                title="Speed a device over ranks", x=wr.SummaryMetric(x), y=wr.SummaryMetric(y)
            )
        case "difference":
            return wr.MarkdownPanel(markdown=f"**{title}**\n\n{INSTEAD['difference']}")


def said_of(panel: Panel) -> str:
    """What one reads from it, in a line."""
    return " ".join(filter(None, [f"{panel.title}: {panel.reads}", INSTEAD.get(panel.kind)]))


def logged_as(panel: Panel) -> list[str]:
    """The panel's metrics by the keys that W&B has of a run.

    W&B flattens what is nested in a summary, with a dot before each part: `memory/held_bytes.gradients`.
    """
    return [key for name in panel.metrics for key in _parts(name)]


def _parts(name: str) -> list[str]:
    figure, wild, _ = name.partition(".*")
    return [f"{figure}.{part}" for part in PARTS[figure]] if wild else [name]
