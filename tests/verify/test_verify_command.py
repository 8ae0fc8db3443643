"""`python -m tpresearch.verify`: its table, its record, its exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def verify(tmp_path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"Document {number} says {number * number} again.\n" * 60)
    command = [
        sys.executable, "-m", "tpresearch.verify", "model=toy_mlp", "verify.world_size=2", "verify.steps=2", "data=text",
        f"data.path={tmp_path}/*.txt", f"data.cache_dir={tmp_path}/cache", "tokenizer.vocab_size=300",
        f"hydra.run.dir={tmp_path}/run", *overrides,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.mark.cli
def test_right_plans_pass(tmp_path: Path) -> None:
    done = verify(tmp_path, "verify.plans=[tp,fsdp]", "verify.integers=true")
    assert done.returncode == 0, done.stderr
    assert "each plan computes what one process does" in done.stdout
    record = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert record["passed"]
    assert [(r["plan"], r["optimizer"]) for r in record["results"]] == [
        (plan, optimizer) for plan in ("tp", "fsdp") for optimizer in ("sgd", "adamw")
    ]
    assert all(r["worst"]["gradients"]["error"] < 1e-10 for r in record["results"])
    assert all(r["worst"]["between ranks"]["error"] == 0 for r in record["results"])
    assert [len(r["integers"] or ()) for r in record["results"]] == [
        4,
        0,
        4,
        0,
    ]  # once a plan: no optimizer in it
    assert all(
        e["output"] == e["weight_gradient"] == 0 for r in record["results"] for e in r["integers"] or ()
    )
    assert "mlp.out_proj" in done.stdout


@pytest.mark.cli
def test_a_plan_that_does_not_run_fails_and_says_why(tmp_path: Path) -> None:
    done = verify(
        tmp_path, "verify.plans=[tp]", "verify.optimizers=[sgd]", "model.plans.tp.out_proj.src=replicate"
    )
    assert done.returncode == 1, done.stderr
    assert "tp sgd: did not run" in done.stdout
    assert not json.loads((tmp_path / "run" / "verify.json").read_text())["passed"]


@pytest.mark.cli
@pytest.mark.parametrize(("switch", "code"), [("false", 0), ("true", 1)])
def test_a_mistake_of_the_tutorial_is_named(tmp_path: Path, switch: str, code: int) -> None:
    command = [
        sys.executable, "-m", "tpresearch.verify", "experiment=seed_tp", f"defects.weights_per_rank={switch}",
        "verify.world_size=2", "verify.optimizers=[sgd]", f"hydra.run.dir={tmp_path}",
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == code, done.stderr
    assert ("tp sgd: initial weights of " in done.stdout) == bool(code)


@pytest.mark.cli
def test_an_unknown_plan_is_refused(tmp_path: Path) -> None:
    done = verify(tmp_path, "verify.plans=[tpp]")
    assert done.returncode == 2, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")]
