"""compare.html in a real browser without a network, compare.md, the terminal, and the PNGs."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pytest
import vl_convert
import yaml
from PIL import Image
from rich.console import Console
from support.made_runs import Made, entry, falling

from tpresearch.compare.charts import VEGA_LITE, chart_spec
from tpresearch.compare.groups import comparisons_of, group_each_run
from tpresearch.compare.report import Report
from tpresearch.compare.runs import find_runs
from tpresearch.compare.style import ChartStyle
from tpresearch.track.panels import SECTIONS

if TYPE_CHECKING:
    from playwright.sync_api import Page

ALERT = "</script><!--<img src=x onerror=alert(1)><script>alert(2)</script>"
EXPRESSION = "${alert(3)} {{7*7}} datum['x']\"]//'+alert(4)+'"
BOOM = "<b onclick=alert(5)>boom</b>\x1b[31m"
HOSTILE_KEY = "<img src=x onerror=alert(7)>\x1b[31m|`[a](javascript:alert(8))"
PANELS = {panel.name: panel for panels in SECTIONS.values() for panel in panels}
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
)
QUIET += ("--disable-component-update", "--disable-sync")
WAIT = "[...document.querySelectorAll('figure')].every(figure => figure.querySelector('svg.marks'))"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five runs with hostile names; three differ only in their ranks, and one ended early."""
    folder = tmp_path_factory.mktemp("made")
    tp = [entry("tp", "all_gather", 3 * 2**20), entry("tp", "reduce_scatter", 2**20, "backward")]
    gathered = [entry("dp_shard", "all_gather", 2**21)]
    runs = [
        Made(name=ALERT, mfu=0.4),
        Made("tp", {"tp": 2}, name=EXPRESSION, mfu=0.375, sent=tp, speed=800.0, memory=2**29),
        Made("tp", {"tp": 4}, name="tp4", mfu=0.25, sent=tp, speed=600.0, loss=lambda s: falling(s) + 1e-6),
        Made("tp", {"tp": 8}, name="tp8", mfu=0.125, sent=tp, speed=200.0, loss=lambda s: falling(s) - 1e-7),
        Made("fsdp", {"dp_shard": 2}, name="ended", steps=7, sent=gathered, error=ValueError(BOOM)),
    ]
    for index, run in enumerate(runs):
        run.corpus_hash = "<i>hash</i>"
        run.write(folder / "sweep" / str(index))
    config = yaml.safe_load((folder / "sweep" / "0" / "config.yaml").read_text())
    config["model"] |= {HOSTILE_KEY: r"a\|b `c` ![x](http://beacon)"}
    (folder / "sweep" / "0" / "config.yaml").write_text(yaml.safe_dump(config))
    found = find_runs([str(folder / "sweep")])
    groups = group_each_run(found.runs)
    left_out = [f"{folder}/sweep/9: <script>alert(6)</script>\x1b]0;title\x07"]
    comparisons = comparisons_of(groups)
    report = Report(found.runs, groups, comparisons, ["corpus_hash differs: <u>\x9b2J"], left_out)
    report.write(folder, ["sweep", "<s>"])
    with (folder / "terminal.txt").open("w") as file:
        report.print(Console(file=file, width=250), folder)
    return folder


@dataclass
class Seen:
    """What a browser came across."""

    page: Page
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def seen(made: Path) -> Iterator[Seen]:
    """The page once it is drawn, in Chromium without a network."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium is installed here (apt-get install chromium)")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=list(QUIET))
        page = browser.new_context(offline=True, viewport={"width": 1400, "height": 900}).new_page()
        seen = Seen(page)
        page.on("console", lambda message: seen.messages.append(message.text))
        page.on("pageerror", lambda error: seen.messages.append(str(error)))
        page.on("request", lambda request: seen.requests.append(request.url))
        page.on("dialog", lambda dialog: (seen.dialogs.append(dialog.message), dialog.dismiss()))
        page.goto((made / "compare.html").as_uri())
        page.wait_for_function(WAIT, timeout=600_000)
        yield seen
        browser.close()


def test_it_draws_with_no_error_and_asks_for_nothing_but_itself(seen: Seen, made: Path) -> None:
    assert seen.messages == []
    assert seen.dialogs == []
    assert seen.requests == [(made / "compare.html").as_uri()]


@pytest.mark.parametrize("name", PANELS)
def test_each_panel_has_its_marks(seen: Seen, name: str) -> None:
    figure = seen.page.locator(f"figure#{name}")
    assert figure.locator("h3").inner_text() == PANELS[name].title
    assert figure.locator("p").inner_text().startswith(PANELS[name].description)
    marks = {"curve": "line", "difference": "line", "pareto": "symbol", "scaling": "symbol"}
    kind = marks.get(PANELS[name].kind, "rect")
    drawn = figure.locator(f".chart svg .mark-{kind}.role-mark path").all()
    colours = {each.get_attribute("stroke" if kind == "line" else "fill") for each in drawn}
    assert len(colours - {None, "transparent"}) >= 2, colours
    box = figure.locator("svg.marks").bounding_box()
    assert box
    assert (580 <= box["width"] <= 620, box["height"] > 100) == (True, True)


def test_a_run_has_one_colour_in_all_panels_and_in_the_table(seen: Seen) -> None:
    swatch = seen.page.locator("table.figures tr", has_text="tp4").locator(".swatch").get_attribute("style")
    assert swatch == "background: #d55e00"
    for name in ("loss", "difference", "scaling", "memory_against_speed"):
        legend = seen.page.locator(f"figure#{name} .role-legend-entry")
        at = legend.locator(".role-legend-label text").all_text_contents().index("tp4")
        assert legend.locator(".role-legend-symbol path").nth(at).get_attribute("fill") == "#d55e00"
    bars = seen.page.locator("figure#tokens_per_second .mark-rect.role-mark path")
    assert bars.nth(2).get_attribute("fill") == "#d55e00"


def test_lines_of_one_colour_differ_in_their_dash() -> None:
    names = [f"run {number}" for number in range(20)]
    points = pd.DataFrame([{"run": name, "tokens": t, "value": float(t)} for name in names for t in range(3)])
    spec = chart_spec(PANELS["loss"], points, ChartStyle(names, names[:1]))
    svg = vl_convert.vegalite_to_svg(json.dumps(spec), vl_version=VEGA_LITE)
    lines = re.findall(r'<path[^>]*"line mark"[^>]*>', svg)
    looks = [re.findall(r' stroke(?:-dasharray)?="([^"]*)"', line) for line in lines]
    assert len(looks) == 20
    assert len({*map(tuple, looks)}) == 20, looks


def test_names_stay_names(seen: Seen) -> None:
    page = seen.page
    assert page.locator("img, i, u, s, b[onclick]").count() == 0
    assert page.locator("script").count() == 2
    rows = page.locator("table.figures").first.locator("tr")
    first = [rows.nth(i + 1).locator("td").first.inner_text() for i in range(5)]
    assert first == [ALERT, EXPRESSION, "tp4", "tp8", "ended (failed)"]
    page.locator("figure#tokens_per_second .mark-rect.role-mark path").first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert ALERT in page.locator("#vg-tooltip-element").inner_text()
    assert page.locator("img").count() == 0
    assert seen.dialogs == []


def test_a_click_in_the_legend_shows_one_run(seen: Seen) -> None:
    figure = seen.page.locator("figure#loss")
    lines = figure.locator(".mark-line.role-mark path")

    def opacities() -> list[str]:
        return sorted(line.get_attribute("opacity") or "1" for line in lines.all())

    assert opacities() == ["1"] * 5
    figure.locator(".role-legend-label text", has_text="tp8").click()
    faint = "document.querySelectorAll(`#loss .mark-line.role-mark path[opacity='0.1']`).length === 4"
    seen.page.wait_for_function(faint, timeout=600_000)
    assert opacities() == ["0.1"] * 4 + ["1"]


def test_the_page_says_what_the_terminal_says(seen: Seen, made: Path) -> None:
    page, terminal = seen.page, (made / "terminal.txt").read_text()
    header = page.locator("table.figures").first.locator("th").all_inner_texts()
    figures = ["loss", "held-out loss", "tok/s/device", "MFU", "peak memory"]
    assert header[:-4] == ["run", "ranks", *figures]
    assert header[-4:] == ["communication per step (rank 0)", "time", "max |loss difference|", "status"]
    cells = page.locator("table.figures tr", has_text="tp4").locator("td").all_inner_texts()
    assert cells[:8] == ["tp4", "4", "7.250", "7.500", "600", "25.0%", "8.0 MiB", "4.0 MiB (tp 4.0 MiB)"]
    assert cells[9:] == ["1.0e-06", "completed"]
    for cell in cells:
        assert cell in terminal
    text = page.locator("body").inner_text()
    assert "corpus_hash <i>hash</i>, " in text
    assert "Overlaid although corpus_hash differs: <u>" in text
    assert "sweep/9: <script>alert(6)</script>" in text
    assert "failed: ValueError: <b onclick=alert(5)>boom</b>" in text
    assert "python -m tpresearch.compare sweep '<s>'" in text
    row = page.locator("table.settings").first.locator("tr", has_text="mesh.tp")
    assert row.locator("td").all_inner_texts() == ["mesh.tp", "–", "2", "4", "8", "–"]


def test_only_its_own_scripts_may_run_and_nothing_is_loaded(seen: Seen, made: Path) -> None:
    html = (made / "compare.html").read_text()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    own = r"^default-src 'none'; script-src 'nonce-([\w-]{40,})'; style-src 'unsafe-inline';"
    (nonce,) = re.findall(own, policy)
    assert html.count(f'<script nonce="{nonce}">') == len(re.findall(r"<script", html)) == 2
    assert not re.findall(r"<(?:script|img|link|iframe)[^>]*\b(?:src|href)=", html.partition("<script")[0])
    seen.page.evaluate("document.body.append(document.createElement('script'))")
    seen.page.evaluate("document.body.lastChild.textContent = 'document.title = \"taken\"'")
    assert seen.page.title() == "5 runs of llama2_debug"


def test_markdown_and_terminal_interpret_no_name(made: Path) -> None:
    text, terminal = (made / "compare.md").read_text(), (made / "terminal.txt").read_text()
    assert not re.findall(r"<[a-z/!]", text)
    assert "| &lt;/script&gt;&lt;!--&lt;img src=x onerror=alert(1)&gt;&lt;script&gt;" in text
    assert not re.search(r"(?<!\\)\]\(|(?<!\\)`", text)
    header, *rows = [
        re.split(r"(?<!\\)(?:\\\\)*\|", line)
        for line in text.split("Config differences")[1].splitlines()[2:9]
    ]
    assert {len(row) for row in rows if len(row) > 2} == {len(header)} == {8}
    assert "alert(7)&gt;\ufffd[31m\\|\\`[a\\](javascript" in text
    assert "alert(7)>\ufffd[31m|`[a](javascript" in terminal
    assert "Left out: " in text
    assert ALERT in terminal
    assert "\ufffd]0;title\ufffd" in terminal
    assert "<u>\ufffd2J" in terminal
    for written in (text, terminal):
        assert {c for c in written if not c.isprintable()} == {"\n"}


@pytest.mark.parametrize("name", PANELS)
def test_each_png_is_a_picture(made: Path, name: str) -> None:
    image = Image.open(io.BytesIO((made / "compare" / f"{name}.png").read_bytes())).convert("RGB")
    assert image.width >= 1200
    assert image.height >= 300
    counted = image.getcolors(maxcolors=image.width * image.height)
    assert counted
    drawn = 0
    for count, colour in counted:
        assert isinstance(colour, tuple)
        drawn += count > 40 and max(colour) - min(colour) > 60
    assert drawn >= 2  # at least two colours that are no grey
    assert max(counted)[1] == (255, 255, 255)
    assert max(counted)[0] > image.width * image.height * 0.3


def test_a_panel_without_data_is_said_and_its_old_png_goes(tmp_path: Path) -> None:
    Made(steps=2).write(tmp_path / "run")
    runs = find_runs([str(tmp_path / "run")]).runs
    groups = group_each_run(runs)
    old = tmp_path / "compare" / "mfu.png"
    old.parent.mkdir()
    old.write_bytes(b"old")
    Report(runs, groups, comparisons_of(groups), [], []).write(tmp_path, [])
    assert not old.exists()
    html = (tmp_path / "compare.html").read_text()
    missing = dict(re.findall(r'<p class="quiet missing"><b>(.*?)</b> is left out\. (.*?)</p>', html))
    assert missing["MFU"].startswith("No run has perf/mfu.")
    assert missing["Scaling efficiency"] == "No two runs differ only in the size of one mesh axis."
    assert missing["Loss difference from the baseline"] == "There is only one run."
    assert "<p>There is only one run.</p>" in html
    assert sorted(os.listdir(tmp_path)) == ["compare", "compare.html", "compare.md", "run"]
