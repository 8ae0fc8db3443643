"""The real client saves to the loopback server: what arrives there is the dashboard that is declared."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
from support.fake_wandb import ENTITY, FakeWandb
from support.saved_views import sections_of, view_of

from tpresearch.config.errors import ConfigError
from tpresearch.dashboard import main
from tpresearch.launch.options import command
from tpresearch.track.panels import SECTIONS

Dashboard = Callable[..., None]
BY_PLAN = [{"section": "config", "name": "parallel.value.name"}]
KINDS = {
    "curve": "Run History Line Plot",
    "difference": "Markdown Panel",
    "bars": "Bar Chart",
    "parts": "Bar Chart",
    "ledger": "Bar Chart",
    "pareto": "Scatter Plot",
    "scaling": "Scatter Plot",
}


def of_group(runset: dict[str, Any]) -> str:
    """The group to which a set of runs is held."""
    (condition,) = runset["filters"]["filters"]
    assert (condition["key"], condition["op"]) == ({"section": "run", "name": "group"}, "=")
    return condition["value"]


def test_the_workspace_has_the_declared_sections_of_the_group_by_plan(
    dashboard: Dashboard, server: FakeWandb
) -> None:
    dashboard("group=study")
    view = view_of(server, "project-view")
    assert (view["entityName"], view["projectName"]) == (ENTITY, "tpresearch")
    assert view["displayName"] == "study by plan"
    sections = sections_of(view["spec"])
    assert list(sections) == ["Correctness", "Speed", "Memory and communication"]
    for name, panels in SECTIONS.items():
        assert [panel["viewType"] for panel in sections[name]] == [KINDS[panel.kind] for panel in panels]
    loss, difference, *_ = sections["Correctness"]
    assert loss["config"] == {"chartTitle": "Loss", "xAxis": "train/tokens", "metrics": ["train/loss"]}
    assert "tpresearch.compare" in difference["config"]["value"]
    *_, sent, pareto = sections["Memory and communication"]
    assert sent["config"]["metrics"][1] == "comm/bytes_per_step_by_collective.dp_shard/all_gather"
    assert pareto["config"]["yAxis"] == "summary:memory/peak_bytes"  # as compare draws it
    (runs,) = view["spec"]["section"]["runSets"]
    assert (of_group(runs), runs["grouping"]) == ("study", BY_PLAN)
    settings = view["spec"]["section"]["settings"]
    assert settings["xAxis"] == "train/tokens"
    assert settings["shouldAutoGeneratePanels"] is False


def test_the_report_has_the_same_charts_and_what_one_reads_from_them(
    dashboard: Dashboard, server: FakeWandb
) -> None:
    dashboard("group=study")
    view = view_of(server, "runs")
    assert (view["displayName"], view["description"]) == (
        "study by plan",
        "The runs of group study, by plan.",
    )
    blocks = [block for block in view["spec"]["blocks"] if block["type"] != "paragraph"]
    workspace = sections_of(view_of(server, "project-view")["spec"])
    for (title, panels), heading, said, grid in zip(
        SECTIONS.items(), *(blocks[i::3] for i in range(3)), strict=True
    ):
        assert heading["children"] == [{"text": title}]
        lines = [item["children"][0]["children"][0]["text"] for item in said["children"]]
        for panel, line in zip(panels, lines, strict=True):
            assert line.startswith(f"{panel.title}: {panel.description}")
        (runs,) = grid["metadata"]["runSets"]
        assert (of_group(runs), runs["grouping"]) == ("study", BY_PLAN)
        assert runs["project"] == {"name": "tpresearch", "entityName": ENTITY, "id": "p"}
        charts = grid["metadata"]["panelBankSectionConfig"]["panels"]
        assert [chart["config"] for chart in charts] == [chart["config"] for chart in workspace[title]]
        places = [(chart["layout"]["x"], chart["layout"]["y"]) for chart in charts]
        assert places == [(0, 0), (8, 0), (16, 0), (0, 6), (8, 6)][: len(charts)]


@pytest.mark.parametrize("group", ["train/2026-11-23/06-00-00", "lr=0.1 <b> 'c' \"d\" \\e", "größe"])
def test_a_group_is_filtered_by_its_very_name(dashboard: Dashboard, server: FakeWandb, group: str) -> None:
    dashboard(f"group={group}")
    (runs,) = view_of(server, "project-view")["spec"]["section"]["runSets"]
    assert of_group(runs) == group


def test_project_team_and_name_are_options_and_the_report_can_be_left_out(
    dashboard: Dashboard, server: FakeWandb, capsys: pytest.CaptureFixture
) -> None:
    dashboard("group=study", "project=other", "entity=team", "name=Eight plans", "report=false")
    view = view_of(server, "project-view")
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("team", "other", "Eight plans")
    assert [view["type"] for view in server.views] == ["project-view"]
    page = f"{server.url}/team/other?nw={view['name'].removeprefix('nw-').removesuffix('-v')}"
    assert capsys.readouterr() == (f"workspace  {page}\n", "")


def test_saved_again_it_is_a_new_view(dashboard: Dashboard, server: FakeWandb) -> None:
    dashboard("group=study", "report=false")
    dashboard("group=study", "report=false")
    assert len({view["name"] for view in server.views}) == 2
    assert not any(view.get("id") for view in server.views)


def test_an_error_of_the_server_halfway_is_one_line(
    dashboard: Dashboard, server: FakeWandb, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_gql_upsertView", None)
    with pytest.raises(SystemExit) as ended:
        dashboard("group=study")
    out, err = capsys.readouterr()
    assert ended.value.code == 1
    assert out.startswith("workspace  http")
    assert err.startswith("error: W&B did not save the dashboard: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("dry_run", ["true", "false"])
def test_a_name_that_the_client_would_not_take_is_refused(
    dashboard: Dashboard, server: FakeWandb, dry_run: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        dashboard("group=study", "name=plans ✨", f"dry_run={dry_run}")
    assert str(refused.value).startswith("name=plans ✨: ")
    assert server.views == []


def test_without_the_package_it_says_how_to_get_it(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.setattr(sys, "argv", ["dashboard", "group=study", "dry_run=true"])
    with pytest.raises(SystemExit) as ended:
        command(main)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: group=study: wandb-workspaces is not installed; ")
    assert line.endswith("; try: pip install 'tpresearch[dashboard]'")
