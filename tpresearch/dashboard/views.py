"""A workspace and a report over the runs of one W&B group: the sections of `track/panels.py`, by plan."""

from __future__ import annotations

from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from tpresearch.dashboard.charts import chart_of, said_of
from tpresearch.track.names import X_AXIS
from tpresearch.track.panels import SECTIONS

PLAN = "parallel.name"
"""Key of a run's config."""
COLUMNS, WIDTH, HEIGHT = 3, 8, 6
"""Charts in a row, and a chart's size on a report's grid of 24."""


def workspace(group: str, name: str, project: str, entity: str) -> ws.Workspace:
    """A view of the project that shows only our charts; a line, a bar or a colour is a plan."""
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
        runset_settings=ws.RunsetSettings(filters=of_group(group), groupby=[ws.Config(PLAN)]),
    )


def report(group: str, name: str, project: str, entity: str, *, lookup: bool) -> wr.Report:
    """The same charts on a page, each section with what one reads from it.

    Args:
        lookup: let W&B be asked for the project's id, which is saved with the runs, when this is serialised.
    """
    blocks: list[Any] = []
    where: dict[str, Any] = {"entity": entity, "project": project} if lookup else {}
    for title, panels in SECTIONS.items():
        runs = wr.Runset(**where, name=group, filters=of_group(group), groupby=[f"config.{PLAN}"])
        charts = list(map(chart_of, panels))
        for place, chart in enumerate(charts):
            row, column = divmod(place, COLUMNS)
            chart.layout = wr.Layout(x=WIDTH * column, y=HEIGHT * row, w=WIDTH, h=HEIGHT)
        said = wr.UnorderedList(list(map(said_of, panels)))
        blocks += [wr.H1(title), said, wr.PanelGrid(runsets=[runs], panels=charts)]
    about = f"The runs of group {group}, by plan."
    return wr.Report(
        project=project, entity=entity, title=name, description=about, blocks=blocks, width="fluid"
    )


def of_group(group: str) -> str:
    """The filter for the group's runs.

    It goes as source code that is parsed again, where `=` and `<` are rewritten even inside a quoted name (0.4.13):
    so all but letters and digits is escaped.
    """
    quoted = "".join(c if c.isalnum() else f"\\U{ord(c):08x}" for c in group)
    return f"Metric('Group') == '{quoted}'"
