"""`python -m tpresearch.dashboard`: without a network, without a key, and refused."""

from __future__ import annotations

import json
import shlex
import socket
import sys
from pathlib import Path

import pytest
from support.commands import ROOT, Done, environment, execute, execute_warm
from support.launches import Command
from support.saved_views import sections_of

from tpresearch.track.panels import SECTIONS
from tpresearch.verify.ranks import Ranks

pytestmark = pytest.mark.cli
CANARY = "canary" + "0" * 34
MODULE = ["-m", "tpresearch.dashboard"]
SAME_COMMAND = ["python", *MODULE]
KINDS = ("workspace", "report")


@pytest.fixture
def typed(ranks: Ranks, tmp_path: Path) -> Command:
    """The command in a fork of a warm process."""

    def run(*words: str, **env: str) -> Done:
        return execute_warm(ranks, None, [*MODULE, *words], tmp_path, environment(**env))

    return run


def refusal(done: Done) -> tuple[str, list[str]]:
    """The one line of a refusal, and the command that it ends with."""
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith("error: ")
    sentence, _, command = done.err.strip().removeprefix("error: ").partition("; try: ")
    return sentence, shlex.split(command)


@pytest.fixture
def closed() -> str:
    """The URL of a port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as was:
        return f"http://127.0.0.1:{was.getsockname()[1]}"


def test_a_dry_run_writes_what_would_be_sent(tmp_path: Path, closed: str) -> None:
    """Without a key, in a process of its own, with all that it imports."""
    env = environment(WANDB_BASE_URL=closed, PYTHONPATH=str(ROOT))
    done = execute([sys.executable, *MODULE, "group=sweeps/8", "dry_run=true"], tmp_path, env)
    folder = Path("outputs/dashboard/sweeps/8")
    said = f"workspace  {folder}/workspace.json\nreport     {folder}/report.json\n"
    assert (done.code, done.out, done.err) == (0, said, "")
    workspace, report = (json.loads((tmp_path / folder / f"{kind}.json").read_text()) for kind in KINDS)
    assert list(sections_of(workspace["spec"])) == list(SECTIONS)
    assert (workspace["displayName"], report["displayName"]) == ("sweeps/8 by plan", "sweeps/8 by plan")


def test_a_dry_run_asks_nothing_of_a_host_that_would_answer(typed: Command, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as host:
        host.setblocking(False)
        url = f"http://127.0.0.1:{host.getsockname()[1]}"
        words = ("group=g", "dry_run=true", "entity=team", "out=~/json")
        done = typed(*words, WANDB_BASE_URL=url, WANDB_API_KEY=CANARY, HOME=str(tmp_path))
        with pytest.raises(BlockingIOError):
            host.accept()
    assert done.out == "workspace  json/workspace.json\nreport     json/report.json\n"
    workspace, report = (json.loads((tmp_path / f"json/{kind}.json").read_text()) for kind in KINDS)
    assert (workspace["entity"], report["project"]["entityName"]) == ("team", "team")
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if CANARY.encode() in path.read_bytes()]


def test_without_a_key_it_is_refused(typed: Command, closed: str) -> None:
    sentence, command = refusal(typed("group=g", WANDB_BASE_URL=closed))
    assert sentence.startswith("dry_run=false: there is no W&B API key; ")
    assert command == [*SAME_COMMAND, "group=g", "dry_run=true"]


def test_where_the_host_does_not_answer_it_is_refused(typed: Command, closed: str) -> None:
    done = typed("group=g", WANDB_BASE_URL=closed, WANDB_API_KEY=CANARY)
    sentence, command = refusal(done)
    assert sentence.startswith(f"dry_run=false: {closed} does not answer; ")
    assert command == [*SAME_COMMAND, "group=g", "dry_run=true"]
    assert CANARY not in done.err


@pytest.mark.parametrize(
    ("words", "begins", "to_try"),
    [
        (["grup=g"], "grup=g: unknown option; ", ["group=g"]),
        (["dry_run=true"], "group=: required and not given; ", ["dry_run=true", "group=<group>"]),
        (
            ["group=g", "dry_run=true", "out=/dev/null"],
            "out=/dev/null: cannot be written: File exists; ",
            ["group=g", "dry_run=true", "out=dashboard"],
        ),
        (["group=g", "dry_run=perhaps"], "dry_run=perhaps: ", ["group=g"]),
    ],
)
def test_a_wrong_option_is_refused(typed: Command, words: list[str], begins: str, to_try: list[str]) -> None:
    sentence, command = refusal(typed(*words))
    assert sentence.startswith(begins)
    assert command == [*SAME_COMMAND, *to_try]
