"""`python -m tpresearch.verify`: its table, its record, its exit code."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from support.commands import Done, environment, execute, execute_warm
from support.composed import config
from support.marks import exhaustive

from tpresearch.config.choices import DeviceKind
from tpresearch.config.validate import total_steps
from tpresearch.launch import Run, World
from tpresearch.train.optim import learning_rate
from tpresearch.verify.__main__ import VerifyPreflight, main
from tpresearch.verify.integers import IntegerResult
from tpresearch.verify.plans import Result, _with_two_micro_batches, with_device_chosen
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.trace import MaxError

pytestmark = pytest.mark.cli


def verify(ranks: Ranks | None, tmp_path: Path, *overrides: str) -> Done:
    """The command in a fork of a warm process, its ranks forked from the same server; without `ranks`, all of its own."""
    words = ["-m", "tpresearch.verify", f"hydra.run.dir={tmp_path}/run", *overrides]
    if ranks is None:
        return execute([sys.executable, *words], tmp_path, environment(tmp_path))
    return execute_warm(ranks, None, words, tmp_path, environment(tmp_path))


def verify_texts(ranks: Ranks | None, tmp_path: Path, *overrides: str) -> Done:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"Document {number} says {number * number} again.\n" * 60)
    small = ["model=toy_mlp", "verify.world_size=2", "verify.steps=2", "tokenizer.vocab_size=300"]
    texts = ["data=text", f"data.path={tmp_path}/*.txt", f"data.cache_dir={tmp_path}/cache"]
    return verify(ranks, tmp_path, *small, *texts, *overrides)


def test_right_plans_pass(tmp_path: Path) -> None:
    done = verify_texts(None, tmp_path, "verify.plans=[tp,fsdp]", "verify.integers=true")
    assert done.code == 0, done.err
    assert "each plan computes what one process does" in done.out
    record = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert record["passed"]
    assert [(r["plan"], r["optimizer"]) for r in record["results"]] == [
        (plan, optimizer) for plan in ("tp", "fsdp") for optimizer in ("sgd", "adamw")
    ]
    assert all(r["worst"]["gradients"]["error"] < 1e-10 for r in record["results"])
    assert all(r["worst"]["between ranks"]["error"] == 0 for r in record["results"])
    # Once per plan: no optimizer is in it.
    assert [len(r["integers"] or ()) for r in record["results"]] == [4, 0, 4, 0]
    assert all(
        e["output"] == e["weight_gradient"] == 0 for r in record["results"] for e in r["integers"] or ()
    )
    assert "mlp.out_proj" in done.out


def test_errors_that_are_not_finite_are_null_in_the_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = Result("tp", "sgd", 1e-10, {"tp": 2}, {"loss": MaxError(float("nan"), 0)}, ["loss"])
    lost.integers = [IntegerResult("mlp.in_proj", "in_proj", float("inf"), 0.0, float("nan"))]
    monkeypatch.setattr("tpresearch.verify.plans.verify_plans", lambda *_: [lost])
    with pytest.raises(SystemExit):
        main.main(VerifyPreflight(config(program="verify"), {}), Run(tmp_path, World()))

    def refuse(number: str) -> None:
        raise AssertionError(f"{number} is not JSON")

    record = json.loads((tmp_path / "verify.json").read_text(), parse_constant=refuse)
    (result,) = record["results"]
    assert (record["passed"], result["worst"]["loss"]["error"]) == (False, None)
    assert not dataclasses.replace(lost, out=[]).passed
    (exact,) = result["integers"]
    assert (exact["output"], exact["input_gradient"], exact["weight_gradient"]) == (None, 0.0, None)


def test_every_axis_of_a_plan_has_two_ranks_unless_its_mesh_says_one(ranks: Ranks, tmp_path: Path) -> None:
    words = ["parallel=hsdp", "optimizer=sgd", "verify.steps=1"]
    done = verify_texts(ranks, tmp_path, *words)
    assert done.code == 0, done.err
    assert "hsdp    2x2x1" in done.out
    assert "runs without" not in done.out
    assert max(map(len, done.out.splitlines())) <= 80
    (result,) = json.loads((tmp_path / "run" / "verify.json").read_text())["results"]
    assert result["mesh"] == {"dp_replicate": 2, "dp_shard": 2, "tp": 1}


def test_an_axis_that_was_left_out_is_said(ranks: Ranks, tmp_path: Path) -> None:
    words = ["verify.plans=[fsdp_tp]", "verify.optimizers=[sgd]", "verify.steps=1", "mesh.dp_shard=1"]
    done = verify_texts(ranks, tmp_path, *words)
    assert done.code == 0, done.err
    assert "fsdp_tp 1x1x2" in done.out
    assert "parallel=fsdp_tp on 2 ranks runs without dp_shard (size 1); with 4 ranks " in " ".join(
        done.out.split()
    )


def test_a_plan_that_does_not_run_fails_and_says_why(ranks: Ranks, tmp_path: Path) -> None:
    done = verify_texts(
        ranks,
        tmp_path,
        "verify.plans=[tp]",
        "verify.optimizers=[sgd]",
        "~model.plans.tp.in_proj",
        "+model.plans.tp.own={match: mlp.in_proj, _target_: torch.distributed.tensor.parallel.ColwiseParallel}",
        "model.plans.tp.out_proj.src=replicate",
    )
    assert done.code == 1, done.err
    assert (
        "tp sgd: did not run: tpresearch.config.errors.WrongModel: model=toy_mlp: it runs whole, "
        in " ".join(done.out.split())
    )
    assert not json.loads((tmp_path / "run" / "verify.json").read_text())["passed"]


@pytest.mark.parametrize(("switch", "code"), [exhaustive("false", 0), ("true", 1)])
def test_a_mistake_of_the_tutorial_is_named(ranks: Ranks, tmp_path: Path, switch: str, code: int) -> None:
    words = ["experiment=seed_tp", f"defects.weights_per_rank={switch}"]
    done = verify(ranks, tmp_path, *words, "verify.world_size=2", "verify.optimizers=[sgd]")
    assert done.code == code, done.err
    assert ("tp sgd: initial weights of " in done.out) == bool(code)


def test_each_step_has_a_learning_rate_of_its_own() -> None:
    """Otherwise a plan that keeps the first one would pass."""
    for words in ((), ("verify.steps=4", "schedule=cosine")):
        cfg = config(*words, program="verify")
        rates = [learning_rate(step, total_steps(cfg), 1.0, cfg.schedule) for step in range(cfg.verify.steps)]
        assert len(set(rates)) == cfg.verify.steps


@pytest.mark.parametrize(("plan", "rows"), [("none", 8), ("fsdp", 2), ("hsdp_tp", 2)])
def test_each_rank_has_two_micro_batches_unless_told_otherwise(plan: str, rows: int) -> None:
    """Of 16 rows, on 1, 4 and 8 ranks, so that what is added up over them is verified too."""
    words = [f"parallel={plan}", "verify.world_size=4"]
    found = (
        _with_two_micro_batches(config(*words, *more, small=False, program="verify")).train.micro_batch_size
        for more in ([], ["train.micro_batch_size=1"], ["train.global_batch_size=4"])
    )
    assert list(found) == [rows, 1, {"none": 2}.get(plan)]


def test_an_unknown_plan_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    done = verify_texts(ranks, tmp_path, "verify.plans=[tpp]")
    assert done.code == 2, done.err
    assert [line for line in done.err.splitlines() if line.startswith("error: ")]
    done = verify_texts(ranks, tmp_path, "parallel=tp", "verify.plans=[sp]")
    assert done.refusal.startswith("error: parallel=tp: verify.plans is given too; one of both; try: ")
    assert done.command_to_try[-1] == "verify.plans=[sp]"
    assert verify_texts(ranks, tmp_path, "resume=mine").refusal.startswith(
        "error: resume=mine: what is built here"
    )


def test_a_plan_that_the_model_has_no_rules_for_is_refused_with_those_it_has(
    ranks: Ranks, tmp_path: Path
) -> None:
    done = verify_texts(ranks, tmp_path, "~model.plans.sp")
    assert done.refusal.startswith(
        "error: verify.plans=[none,ddp,tp,sp,fsdp,hsdp,fsdp_tp,hsdp_tp]: model toy_mlp has no sharding rules for sp, "
    )
    assert done.command_to_try[-1] == "verify.plans=[none,ddp,tp,fsdp,hsdp]"
    done = verify_texts(ranks, tmp_path, "parallel=sp", "~model.plans.sp.out_proj")
    assert done.refusal.startswith("error: model.plans.sp=sp: mlp.out_proj.weight has no sharding rule"), (
        done.err
    )


def test_an_option_that_the_device_lacks_is_refused_before_ranks_start(ranks: Ranks, tmp_path: Path) -> None:
    done = verify_texts(ranks, tmp_path, "verify.plans=[none,fsdp]", "parallel.fsdp.cpu_offload=true")
    assert (done.code, done.refusals) == (2, [done.err.strip()]), done.err
    assert done.refusal.startswith("error: parallel.fsdp.cpu_offload=true: CPU offload needs a CUDA device; ")


def test_ranks_that_do_not_divide_a_model_are_answered_by_a_number_of_ranks_that_does(
    ranks: Ranks, tmp_path: Path
) -> None:
    done = verify(ranks, tmp_path, "model=llama2_debug", "model.n_kv_heads=2", "verify.plans=[sp,fsdp]")
    assert done.refusal.startswith("error: mesh.tp=4: does not divide model.n_kv_heads=2"), done.err
    assert done.command_to_try[-2:] == ["verify.plans=[sp,fsdp]", "verify.world_size=2"]


def test_plans_of_one_and_of_four_ranks_are_on_one_kind_of_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Left to each, one process would take a machine's only GPU, and four ranks its CPU."""
    plans = {plan: [config(f"parallel={plan}"), config(f"parallel={plan}")] for plan in ("none", "fsdp_tp")}
    too_old = False  # the driver, for this torch, which counts its GPUs all the same
    for gpus, usable, kind in ((0, False, "cpu"), (1, True, "cpu"), (4, True, "cuda"), (4, too_old, "cpu")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        monkeypatch.setattr(torch.cuda, "is_available", lambda usable=usable: usable)
        assert {c.device for cfgs in with_device_chosen(plans).values() for c in cfgs} == {DeviceKind(kind)}
    asked = {plan: [config(f"parallel={plan}", "device=cuda")] for plan in plans}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert with_device_chosen(asked) == asked
