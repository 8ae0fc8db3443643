"""The house: folders import as docs/house.md says, downward only and in no circle, and no file is two ideas."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
ALONE = {"agent", "interrupt"}
"""Files outside of the folders that any folder may import."""
LONGEST = 300


def modules() -> dict[str, Path]:
    files = (ROOT / "tpresearch").rglob("*.py")
    named = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of ours that a file imports anywhere in it: late, or for its types alone, too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in known:
            found |= {
                full if (full := f"{node.module}.{alias.name}") in known else node.module
                for alias in node.names
            }
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name in known}
    return found - {name for name, other in known.items() if other == path}


def room(module: str) -> str:
    return module.split(".")[1]


def test_nothing_imports_in_a_circle() -> None:
    known = modules()
    graph = {name: imported(path, known) for name, path in known.items()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(known)  # it raises for a circle


def table() -> dict[str, set[str]]:
    """The folders of docs/house.md in their order, and what each may import by it."""
    first = PAGE.partition("## What is in them")[0]
    rows = re.findall(r"^\| `(\w+)(?:/|\.py)` \| .* \| (.*) \|$", first, re.MULTILINE)
    return {name: set(re.findall(r"\w+", cell)) & {name for name, _ in rows} for name, cell in rows}


def test_folders_import_what_the_table_says() -> None:
    known, allowed = modules(), table()
    found: dict[str, set[str]] = {name: set() for name in allowed}
    for name, path in known.items():
        if name != "tpresearch" and room(name) in allowed:
            others = imported(path, known) - {"tpresearch"}
            found[room(name)] |= {room(other) for other in others} - {room(name)}
    assert {name: rooms - ALONE for name, rooms in found.items()} == allowed


def test_the_table_is_ordered() -> None:
    order = list(table())
    upward = [
        (name, other)
        for name, others in table().items()
        for other in others
        if order.index(other) > order.index(name)
    ]
    assert upward == []


def test_the_page_says_what_each_file_is() -> None:
    about = dict(re.findall(r"^- \*\*(\w+)/\*\* (.*?)(?=^- \*\*|^## )", PAGE, re.MULTILINE | re.DOTALL))
    files = [path for path in modules().values() if not path.name.startswith("__")]
    inside = [path for path in files if path.parent.name != "tpresearch"]
    assert [path for path in inside if f"`{path.name}`" not in about[path.parent.name]] == []


def test_no_file_is_two_ideas() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_results_are_complete_or_absent() -> None:
    """JSON is written by `track.record.write_json`, but for what writes into a draft, or tells torchrun why a rank has ended."""
    written = [path for path in modules().values() if "write_text(json." in path.read_text()]
    assert {path.parent.name for path in written} == {"data", "hf", "launch"}


def test_models_know_nothing_of_ranks() -> None:
    for path in (ROOT / "tpresearch" / "models").glob("*.py"):
        assert "torch.distributed" not in path.read_text()
        assert imported(path, modules()) <= {"tpresearch.models"}


def test_an_axis_is_spelled_where_it_is_defined() -> None:
    spelled = {name for name, path in modules().items() if "dp_replicate" in path.read_text()}
    assert spelled == {"tpresearch.config.axes", "tpresearch.config.schema"}
