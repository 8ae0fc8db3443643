"""The house: rooms import downward only, in no circle, and no file is two ideas."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"config", "agent", "interrupt"},
    {"models", "plan", "data"},
    {"parallel", "ledger", "checkpoint", "hf", "launch"},
    {"track"},
    {"sweep", "train", "compare", "dashboard", "prepare", "export", "checkpoints"},
    {"verify", "import_hf", "simulate", "planner"},
    {"api"},
    {"__main__", "calibrate"},
]
"""Lowest first: a room imports from its own floor or from below."""
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


def test_rooms_import_downward() -> None:
    known = modules()
    floor = {name: level for level, rooms in enumerate(FLOORS) for name in rooms}
    upward = [
        f"{name} -> {other}"
        for name, path in known.items()
        if name != "tpresearch"
        for other in imported(path, known)
        if other != "tpresearch" and floor[room(other)] > floor[room(name)]
    ]
    assert upward == []


def test_no_file_is_two_ideas() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_models_know_nothing_of_ranks() -> None:
    for path in (ROOT / "tpresearch" / "models").glob("*.py"):
        assert "torch.distributed" not in path.read_text()
        assert imported(path, modules()) <= {"tpresearch.models"}


def test_an_axis_is_spelled_where_it_is_defined() -> None:
    spelled = {name for name, path in modules().items() if "dp_replicate" in path.read_text()}
    assert spelled == {"tpresearch.config.axes", "tpresearch.config.schema"}
