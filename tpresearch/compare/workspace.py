"""The sections of `track/panels.py` as a W&B workspace and a report over the runs of one group, by plan: see `tpresearch.dashboard`."""

from __future__ import annotations

from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from tpresearch.track.names import SUMMARY_PARTS, X_AXIS
from tpresearch.track.panels import SECTIONS, Kind, Panel

PLAN = "parallel.name"
"""Key of a run's config."""
COLUMNS, WIDTH, HEIGHT = 3, 8, 6
"""Charts per row, and a chart's size on a report's grid of 24."""
PANEL_NOTES: dict[Kind, str] = {
    "difference": "Not in W&B, whose expressions see one run at a time; `python -m tpresearch.compare` draws it.",
    "scaling": "W&B, whose expressions see one run at a time, shows the speed itself: level if scaling is perfect.",
}
"""Notes on panels that W&B cannot draw as declared."""


def workspace(group: str, name: str, project: str, entity: str) -> ws.Workspace:
    """A view of the project with only our charts; each line, bar or colour is a plan."""
    sections = [
        ws.Section(title, panels=list(map(chart_of, panels)), is_open=True)
        for title, panels in SECTIONS.items()
    ]
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=sections,
        settings=ws.WorkspaceSettings(x_axis=X_AXIS),
        runset_settings=ws.RunsetSettings(filters=_group_filter(group), groupby=[ws.Config(PLAN)]),
    )


def report(group: str, name: str, project: str, entity: str, *, lookup: bool) -> wr.Report:
    """A report: the workspace's charts on a page, each section with how to read it.

    Args:
        lookup: ask W&B for the project's id, which is saved with the runs, when this is serialised.
    """
    blocks: list[Any] = []
    where: dict[str, Any] = {"entity": entity, "project": project} if lookup else {}
    for title, panels in SECTIONS.items():
        runs = wr.Runset(**where, name=group, filters=_group_filter(group), groupby=[f"config.{PLAN}"])
        charts = list(map(chart_of, panels))
        for index, chart in enumerate(charts):
            row, column = divmod(index, COLUMNS)
            chart.layout = wr.Layout(x=WIDTH * column, y=HEIGHT * row, w=WIDTH, h=HEIGHT)
        lines: list[Any] = [
            f"{panel.title}: {panel.description} {PANEL_NOTES.get(panel.kind, '')}".strip()
            for panel in panels
        ]
        blocks += [wr.H1(title), wr.UnorderedList(lines), wr.PanelGrid(runsets=[runs], panels=charts)]
    about = f"The runs of group {group}, by plan."
    return wr.Report(
        project=project, entity=entity, title=name, description=about, blocks=blocks, width="fluid"
    )


def chart_of(panel: Panel) -> Any:
    """The chart of a panel; if W&B cannot draw it, a note that says where to find it."""
    title = panel.title
    metrics: list[Any] = [key for name in panel.metrics for key in _wandb_keys(name)]
    match panel.kind:
        case "curve":
            return wr.LinePlot(title=title, x=X_AXIS, y=metrics, log_y=panel.log_scale or None)
        case "bars" | "parts" | "ledger":
            return wr.BarPlot(title=title, metrics=metrics)
        case "pareto":
            y, x = metrics
        case "scaling":
            title, x, y = "Tokens per second per device over ranks", "world_size", metrics[0]
        case "difference":
            return wr.MarkdownPanel(markdown=f"**{title}**\n\n{PANEL_NOTES['difference']}")
    return wr.ScatterPlot(title=title, x=wr.SummaryMetric(x), y=wr.SummaryMetric(y))


def _wandb_keys(name: str) -> list[str]:
    """A panel's metric by the keys that W&B has: it flattens a nested summary, as in `memory/held_bytes.gradients`."""
    figure, wild, _ = name.partition(".*")
    return [f"{figure}.{part}" for part in SUMMARY_PARTS[figure]] if wild else [name]


def _group_filter(group: str) -> str:
    """The filter for the group's runs.

    The client (0.4.13) parses it again as source code, and rewrites `=` and `<` even inside a quoted name: so all but
    letters and digits is escaped.
    """
    quoted = "".join(c if c.isalnum() else f"\\U{ord(c):08x}" for c in group)
    return f"Metric('Group') == '{quoted}'"
