"""`debug=fast` and `debug=overfit`, of any config, with no account."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.trainings import Start, Trained

pytestmark = pytest.mark.cli


def debugged(train: Start, tmp_path: Path, small: list[str], *words: str) -> Trained:
    kept = [word for word in small if not word.startswith("train.")]
    done = train(2, tmp_path, *kept, "train.global_batch_size=8", "parallel=fsdp", *words)
    assert done.code == 0, done.err
    (folder,) = tmp_path.glob("outputs/debug/*/*")
    return Trained(done, folder)


def test_fast_does_two_steps_of_everything(train: Start, small: list[str], tmp_path: Path) -> None:
    run = debugged(train, tmp_path, small, "debug=fast")
    assert run.column("train/step") == [1, 2]
    assert None not in run.column("val/loss")
    assert not (run.folder / "wandb").exists()
    assert run.json("summary.json")["perf/step_time_s"] > 0


def test_overfit_learns_one_batch_of_what_cannot_be_learned(train: Start, tmp_path: Path) -> None:
    words = ("data=random_tokens", "tokenizer.vocab_size=300", "data.seq_len=16", "debug=overfit")
    run = debugged(train, tmp_path, [], "model=llama2_debug", *words, "optimizer.lr=1e-2")
    first, last = run.column("train/loss")[0], run.column("train/loss")[-1]
    assert first > 5.5  # ln 300 = 5.7, the least that drawn tokens leave to learn
    assert last < 0.5
