"""A corpus of a few files, a Python kept warm, and the runs that several tests look at."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.fake_wandb import FakeWandb
from support.trainings import ROWS, Done, Trained, environment, on_path, train

SENTENCE = "each rank of the mesh holds a shard of every weight while tokens flow from layer to layer"
Warm = Callable[..., Done]
Train = Callable[..., Trained]


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of a user who has no account anywhere."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    draw = random.Random(0)
    for index in range(60):
        words = " ".join(draw.choices(SENTENCE.split(), k=120))
        (folder / f"{index:02}.txt").write_text(f"Document {index}. {words}\n")
    return folder


@pytest.fixture(scope="session")
def small(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The overrides of a run of seconds."""
    return [
        "model=llama2_debug",
        "data=text",
        f"data.path={texts}/*.txt",
        f"data.cache_dir={tmp_path_factory.mktemp('cache')}",
        "data.seq_len=16",
        "tokenizer.vocab_size=300",
        "train.steps=3",
        "train.global_batch_size=8",
        "train.eval_rows=8",
    ]


@pytest.fixture(scope="session")
def trained(small: list[str], home: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Makes a run that has to complete: `trained(2, "parallel=tp")`, `trained(None)` without torchrun."""

    def make(ranks: int | None, *overrides: str, **env: str) -> Trained:
        folder = tmp_path_factory.mktemp("run")
        done = train(ranks, folder, home, *small, *overrides, **env)
        assert done.code == 0, done.err
        (run,) = folder.glob("outputs/train/*/*")
        return Trained(done, run)

    return make


@pytest.fixture(scope="session")
def warm_python(home: Path) -> Iterator[subprocess.Popen]:
    program = [sys.executable, "-m", "support.warm"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(
        program, env=environment(home, **on_path(Path(__file__).parents[1])), **pipes
    ) as process:
        yield process
        process.stdin.close()


@pytest.fixture
def warm(warm_python: subprocess.Popen, tmp_path: Path) -> Warm:
    """`python train.py ARGUMENTS` in an empty folder, as one rank of `ranks`, in a Python that is warm."""

    def run(*arguments: str, ranks: int = 1, **env: str) -> Done:
        cwd = tmp_path / "cwd"
        cwd.mkdir(exist_ok=True)
        job = {"RANK": "0", "WORLD_SIZE": ranks, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": ranks}
        job |= {"TORCHELASTIC_RUN_ID": "none"}
        env |= {key: str(value) for key, value in job.items()} if ranks > 1 else {}
        assert warm_python.stdin
        assert warm_python.stdout
        warm_python.stdin.write(json.dumps({"arguments": arguments, "cwd": str(cwd), "env": env}) + "\n")
        warm_python.stdin.flush()
        return Done(cpu_seconds=0, **json.loads(warm_python.stdout.readline()))

    return run


@pytest.fixture(scope="session")
def run_2d(trained: Train) -> Trained:
    """The main job: tensor, sequence and data parallelism on four ranks, W&B offline."""
    return trained(4, "parallel=fsdp_tp")


@pytest.fixture(scope="session")
def wandb_server() -> Iterator[FakeWandb]:
    with FakeWandb() as server:
        yield server


@pytest.fixture(scope="session")
def run_fsdp(trained: Train, wandb_server: FakeWandb) -> Trained:
    """Two ranks, a budget of 600 tokens (5 steps of 128), W&B online."""
    return trained(2, *ROWS, "logger.group=study", "logger.tags=[mine]", "name=train", **wandb_server.env())


@pytest.fixture(scope="session")
def run_tp(trained: Train) -> Trained:
    """Two ranks of tensor parallelism, without W&B."""
    return trained(2, "parallel=tp", "logger=none")
