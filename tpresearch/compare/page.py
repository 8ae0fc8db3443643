"""compare.html: one file with everything in it, that asks the network for nothing and runs no script but its own."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tpresearch.compare.charts import Spec, javascript
from tpresearch.track.panels import Panel
from tpresearch.track.table import Table

HERE = Path(__file__).parent


@dataclass
class Section:
    title: str
    panels: list[dict[str, Any]] = field(default_factory=list)
    missing: list[tuple[str, str]] = field(default_factory=list)
    """Titles of panels that no run has data for, and why."""

    def draw(self, panel: Panel, notes: Sequence[str], spec: Spec) -> None:
        about = {"name": panel.name, "title": panel.title, "reads": panel.reads}
        self.panels.append({**about, "notes": notes, "spec": as_data(spec)})

    def leave_out(self, panel: Panel, notes: Sequence[str]) -> None:
        self.missing.append((panel.title, " ".join(notes)))


@dataclass(frozen=True)
class Page:
    title: str
    facts: list[tuple[str, str]]
    """What all runs have in common."""
    warnings: list[str]
    left_out: list[str]
    runs: Table
    seeds: Table | None
    sections: list[Section]
    differences: Table
    folders: Table
    swatches: Mapping[str, str]
    """A colour for each row of `runs`, by its first cell."""
    group_swatches: Mapping[str, str]
    """The same for `seeds`."""
    when: str
    command: str

    def html(self) -> str:
        """The page. Every text in it is escaped; scripts are admitted by their hashes, and no other source of anything."""
        environment = Environment(
            loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        library, start = _wrapped(javascript()), (HERE / "page.js").read_text(encoding="utf-8")
        rules = [row for row in self.differences.rows if row[0].text.startswith("model.plans.")]
        others = [row for row in self.differences.rows if row not in rules]
        return environment.get_template("page.html").render(
            vars(self)
            | {
                "differences": Table(self.differences.header, others),
                "rules": Table(self.differences.header, rules),
            }
            | {"library": Markup(library), "start": Markup(start)}
            | {"hashes": Markup(" ".join(_hash(script) for script in (library, start)))}
        )


def as_data(value: object) -> Markup:
    """JSON for a script element: no text in it can end the element or begin a comment, for it has no `<`, `>` or `&`."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _wrapped(library: str) -> str:
    """In a scope of its own, for the bundle's names are short."""
    return "(() => {" + library.replace("</script", "<\\/script") + "})();"


def _hash(script: str) -> str:
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"'sha256-{digest}'"
