"""A corpus of a few files, `train.py` as it is started, and the runs that several tests look at."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import TORCHRUN, Done, environment, execute, execute_warm
from support.fake_wandb import FakeWandb
from support.trainings import ROWS, TRAIN, Start, Train, Trained

from tpresearch.verify.ranks import Ranks

SENTENCE = "each rank of the mesh holds a shard of every weight while tokens flow from layer to layer"


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
def train(ranks: Ranks, home: Path) -> Start:
    """`train(2, folder, "parallel=tp")` is torchrun with 2 ranks, `train(None, folder)` python; `cold` in new processes,
    `cold_jobs` those of a sweep alone."""

    def start(
        size: int | None,
        folder: Path,
        *overrides: str,
        cold: bool = False,
        cold_jobs: bool = False,
        **env: str,
    ) -> Done:
        folder.mkdir(parents=True, exist_ok=True)
        program = [str(TRAIN), *overrides]
        if not cold:
            return execute_warm(ranks, size, program, folder, environment(home, **env), cold_jobs)
        starter = [str(TORCHRUN), "--standalone", f"--nproc-per-node={size}"] if size else [sys.executable]
        return execute([*starter, *program], folder, environment(home, **env))

    return start


@pytest.fixture(scope="session")
def trained(train: Start, small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Makes a run that has to complete: `trained(2, "parallel=tp")`, `trained(None)` without torchrun."""

    def make(size: int | None, *overrides: str, cold: bool = False, **env: str) -> Trained:
        folder = tmp_path_factory.mktemp("run")
        done = train(size, folder, *small, *overrides, cold=cold, **env)
        assert done.code == 0, done.err
        (run,) = folder.glob("outputs/train/*/*")
        return Trained(done, run)

    return make


@pytest.fixture
def train_py(train: Start, tmp_path: Path) -> Start:
    """`python train.py ARGUMENTS` in a folder of its own, or one process as rank 0 of so many."""

    def start(*arguments: str, size: int = 1, **env: str) -> Done:
        job = {"RANK": "0", "WORLD_SIZE": size, "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": size}
        job |= {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
        env |= {key: str(value) for key, value in job.items()} if size > 1 else {}
        return train(None, tmp_path / "cwd", *arguments, **env)

    return start


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
