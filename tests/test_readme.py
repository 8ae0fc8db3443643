"""The README and docs/ do what they say: their commands run, in their cheapest form, and their tables are those of the files."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.commands import Done, environment, execute, execute_warm

from tpresearch.track.names import METRICS
from tpresearch.verify.ranks import Ranks

ROOT = Path(__file__).parents[1]
PAGES = {
    p: p.read_text(encoding="utf-8") for p in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
}
TEXT = "\n".join(PAGES.values())
GROUPS = ("parallel", "model", "mesh", "data", "tokenizer", "optimizer", "schedule", "checkpoint", "logger")
GROUPS += ("profiler", "experiment", "debug")
TINY_MODEL = ["model.dim=32", "model.n_layers=1", "model.n_heads=4", "model.n_kv_heads=4", "model.ffn_dim=64"]
TINY_RUN = ["train.steps=2", "train.global_batch_size=4", "train.eval_rows=4", "data.seq_len=16"]
TINY_RUN += ["tokenizer.vocab_size=300", "logger=none", "device=cpu"]
SHORT_ROWS = ["train.steps=2", "data.seq_len=16", "tokenizer.vocab_size=300"]


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


BLOCKS = [[line for line in b.replace("\\\n", " ").splitlines() if line] for b in fenced("bash")]
LINES = [line for block in BLOCKS for line in block]


def typed_in(line: str) -> str:
    return line.partition("  # ")[0].strip()


def made_by(line: str) -> set[str]:
    """The folders that a command writes or reads, by which those of a block follow from each other."""
    return set(re.findall(r"\boutputs/\w+", line))


BEFORE = {
    typed_in(line): [typed_in(e) for e in block[:nth] if made_by(e) & made_by(line)]
    for block in BLOCKS
    for nth, line in enumerate(block)
}
"""Each command, and those of its block that have to have run before it."""
COMMANDS = list(BEFORE)
TRANSCRIPTS = [block.partition("\n") for block in fenced("console")]


def test_each_command_says_about_how_long_it_takes() -> None:
    assert [line for line in LINES if not re.search(r"  # .*(about \d|on a GPU)", line)] == []


@pytest.fixture(scope="module")
def run(ranks: Ranks, clone: Path) -> Callable[..., Done]:
    """Runs words in the clone; python and torchrun are forks of a warm process."""

    def start(words: list[str]) -> Done:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = environment(clone, PATH=path, PYTHONPATH=str(clone))
        starter, *program = words
        if starter not in ("python", "torchrun"):
            return execute(words, clone, env)
        size = int(program.pop(0).removeprefix("--nproc-per-node=")) if starter == "torchrun" else None
        return execute_warm(ranks, size, program, clone, env)

    return start


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository as a reader has it, with the files that the pages have them write, and a small corpus."""
    folder = tmp_path_factory.mktemp("clone")
    there = "train.py conf tpresearch experiments Makefile constraints.txt pyproject.toml"
    for name in there.split():
        (folder / name).symlink_to(ROOT / name)
    for language in ("python", "yaml"):
        for block in fenced(language):
            path = folder / block.partition("\n")[0].removeprefix("# ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block)
    (folder / "texts").mkdir()
    for index in range(60):
        (folder / f"texts/{index}.txt").write_text(" ".join(f"word{index * i % 97}" for i in range(120)))
    return folder


@pytest.fixture(scope="module")
def have_run() -> set[str]:
    """The commands that have run in the clone."""
    return set()


def cheap(words: list[str], cache: Path) -> list[str]:
    """The same command on a small corpus and, for a training, two steps of a narrow model; of a sweep two values."""
    if words[0] == "make":
        return ["make", "-n", *words[1:]]
    alone = {f"tpresearch.{name}" for name in ("compare", "dashboard", "checkpoints", "export")}
    if (
        alone.intersection(words)
        or any(word.startswith(("experiments/", "mine/")) for word in words)
        or any(word.startswith("plan_only") for word in words)
    ):
        return words
    if any(word.startswith("experiment=seed_") for word in words):
        return [*words, "device=cpu", *(TINY_MODEL + SHORT_ROWS if "experiment=seed_2d" in words else [])]
    data = [] if any(word.startswith("data=") for word in words) else ["data=text", "data.path=texts/*.txt"]
    ours = {word.partition("=")[0] for word in TINY_RUN}
    kept = [word for word in words if word.partition("=")[0] not in ours]
    kept += ["verify.optimizers=[sgd]", "verify.steps=1"] if "tpresearch.verify" in words else []
    sizes_given = {"model=skip", "model=hf", "model=toy_mlp"}.intersection(words)
    model = [] if sizes_given or "train.py" not in words else TINY_MODEL
    if "-m" in words and words[0] == "python":
        kept = [re.sub(r"^([\w.]+=[^,\[]+,[^,]+),[^\]]*$", r"\1", word) for word in kept]
    return [*kept, *data, *model, *TINY_RUN, f"data.cache_dir={cache}"]


@pytest.mark.cli
@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_runs(command: str, clone: Path, run: Callable[..., Done], have_run: set[str]) -> None:
    for each in [*BEFORE[command], command]:  # another process of the tests may have had those before it
        if each in have_run:
            continue
        words = cheap(shlex.split(each), clone / "cache")
        done = run(words)
        have_run.add(each)
        assert done.code == 0, done.err[-2000:]
        if "train.py" in words and words[0] == "torchrun":
            assert "completed" in done.out or "all 2 steps are done" in done.err


@pytest.mark.cli
@pytest.mark.parametrize(("typed", "_", "output"), TRANSCRIPTS)
def test_each_transcript_is_what_is_printed(
    typed: str, _: str, output: str, run: Callable[..., Done]
) -> None:
    done = run(shlex.split(typed.removeprefix("$ ")))
    printed = done.err if output.startswith("error:") else done.out
    assert printed.strip() == output.strip()
    assert done.code == (2 if output.startswith("error:") else 0)


@pytest.mark.parametrize("group", GROUPS)
def test_the_option_tables_are_the_first_lines_of_the_files(group: str) -> None:
    rows = {
        f"| `{group}={path.stem}` | {first_comment(path)} |"
        for path in (ROOT / "conf" / group).glob("*.yaml")
    }
    assert rows == {line for line in TEXT.splitlines() if line.startswith(f"| `{group}=")}


def first_comment(path: Path) -> str:
    text = path.read_text(encoding="utf-8").removeprefix("# @package _global_\n")
    first = text.partition("\n")[0]
    assert first.startswith("# "), f"{path.name} opens with one line that says when to pick it"
    return first.removeprefix("# ")


def test_the_metrics_table_is_the_declared_one() -> None:
    rows = [f"| `{metric.name}` | {metric.unit} | {metric.meaning} |" for metric in METRICS]
    assert rows == [
        line for line in TEXT.splitlines() if re.match(r"\| `(train|val|perf|time|memory|comm)/\w+` ", line)
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page: Path) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if "://" not in link]
    assert [link for link in links if not (page.parent / link).exists()] == []
