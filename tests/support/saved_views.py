"""What W&B was sent, in the words of its own JSON."""

from __future__ import annotations

from typing import Any

import pandas as pd

from support.fake_wandb import FakeWandb

Json = dict[str, Any]


def view_of(server: FakeWandb, kind: str) -> Json:
    """The one saved view of this type: `project-view`, a workspace, or `runs`, a report."""
    (view,) = [view for view in server.views if view["type"] == kind]
    return view


def sections_of(workspace: Json) -> dict[str, list[Json]]:
    """The panels of each section of a workspace's spec."""
    sections = workspace["section"]["panelBankConfig"]["sections"]
    return {section["name"]: section["panels"] for section in sections}


def metrics_of(panel: Json) -> tuple[set[str], set[str]]:
    """Keys of a run's history and of its summary that a panel shows."""
    config = panel["config"]
    match panel["viewType"]:
        case "Run History Line Plot":
            return {config["xAxis"], *config["metrics"]}, set()
        case "Bar Chart":
            return set(), set(config["metrics"])
        case "Scatter Plot":
            axes = {config["xAxis"], config["yAxis"]}
            assert all(axis.startswith("summary:") for axis in axes)
            return set(), {axis.removeprefix("summary:") for axis in axes}
        case "Markdown Panel":
            return set(), set()
    raise AssertionError(f"a panel of another kind: {panel['viewType']}")


def flat(summary: Json) -> Json:
    """A summary by the names that W&B's pages and its terminal view give it."""
    (found,) = pd.json_normalize(summary).to_dict("records")
    return {str(name): value for name, value in found.items()}
