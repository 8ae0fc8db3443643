"""The Python API: the same configs, plans, steps and records as the commands have."""

from __future__ import annotations

import html
import itertools
import json
import logging.handlers
import operator
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from support.commands import environment, execute
from support.composed import SMALL, config
from support.made_runs import Made, entry
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import tpresearch
from tpresearch.config import ConfigError
from tpresearch.config.axes import DATA_AXES
from tpresearch.config.compose import as_dict
from tpresearch.config.world import World
from tpresearch.data.batches import Batch
from tpresearch.data.pipeline import prepare
from tpresearch.launch.composition import initialize_conf
from tpresearch.parallel.mesh import data_rank, sum_over
from tpresearch.plan.describe import plan_table
from tpresearch.train.losses import Objective, Phase
from tpresearch.train.main import log_notes
from tpresearch.train.step import train_step
from tpresearch.verify.ranks import Ranks
from tpresearch.verify.reference import reference

LLAMA = ("model=llama2_debug", "data=random_tokens")
TRAINED = (*SMALL, *LLAMA, "train.dtype=float64", "train.clip_grad_norm=0.2")


def test_a_name_is_imported_when_it_is_used_and_a_config_needs_no_torch(tmp_path: Path) -> None:
    slow = "{'torch', 'pandas', 'hydra'} & set(sys.modules)"
    program = f"import sys, tpresearch; print(sorted({slow})); tpresearch.load('model=toy_mlp'); print(sorted({slow}))"
    done = execute([sys.executable, "-c", program], tmp_path, environment(PYTHONPATH=":".join(sys.path)))
    assert done.out == "[]\n['hydra']\n", done.err


def test_a_name_is_there_for_completion() -> None:
    assert {*tpresearch.__all__} <= {*dir(tpresearch)}


def test_a_config_is_what_the_command_line_composes() -> None:
    words = ("model=llama2_7b", "parallel=hsdp_tp", "mesh.tp=8", "schedule=wsd", "optimizer.betas=[0.8,0.9]")
    assert as_dict(tpresearch.load(*words)) == as_dict(config(*words, small=False))
    plans = ["none", "ddp", "tp", "sp", "fsdp", "hsdp", "fsdp_tp", "hsdp_tp"]
    assert tpresearch.load(config_name="verify").verify.plans == plans


@pytest.mark.parametrize(
    "key", ["steps", "optimizer.learning_rate", "train.dtyp", "model.dim", "parallel.fsdp.x"]
)
def test_a_key_that_a_config_does_not_have_cannot_be_set(key: str) -> None:
    branch, _, name = key.rpartition(".")
    cfg = tpresearch.load("model=toy_mlp")
    part = operator.attrgetter(branch)(cfg) if branch else cfg
    with pytest.raises(AttributeError, match=name):
        setattr(part, name, 3)


def test_a_caller_has_a_hydra_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a script under `hydra.main`, or a notebook that has called `initialize`."""
    monkeypatch.setattr(GlobalHydra.instance(), "hydra", None)
    with initialize_conf():
        theirs = GlobalHydra.instance().hydra
        assert tpresearch.load("model=toy_mlp").model.name == "toy_mlp"
        with pytest.raises(ConfigError, match=r"^model=toy: no such option"):
            tpresearch.load("model=toy")
        assert GlobalHydra.instance().hydra is theirs


def test_threads_compose_one_after_another() -> None:
    models = ["toy_mlp", "llama2_debug"] * 2
    with ThreadPoolExecutor(4) as pool:
        loaded = pool.map(lambda model: tpresearch.load(f"model={model}"), models)
        assert [cfg.model.name for cfg in loaded] == models


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["model=lama2_tiny"], "model=lama2_tiny: no such option; one of llama2_tiny, "),
        (["+train.stepz=3"], "train.stepz=3: no such key; nearest is train.steps"),
        (["parallel=tp,sp"], "parallel=tp,sp: several values are a sweep"),
    ],
)
def test_a_wrong_override_is_refused_in_the_sentence_of_the_command(words: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(sentence)}"):
        tpresearch.load(*words)
    assert tpresearch.load("model=toy_mlp").model.name == "toy_mlp"  # and what comes after is composed afresh


def test_what_resumes_a_run_on_the_command_line_is_refused() -> None:
    """It would have initial weights, and not even the settings of that run."""
    with pytest.raises(ConfigError, match=r"^resume=outputs/mine: .*; init_from, for the weights"):
        tpresearch.load("model=toy_mlp", "resume=outputs/mine")
    assert tpresearch.load("model=toy_mlp", "resume=never").resume == "never"


@pytest.mark.parametrize("given", [["model=toy_mlp"], 3, None])
def test_overrides_in_a_list_are_refused_in_one_sentence(given: Any) -> None:
    with pytest.raises(TypeError, match=r"each override is a string of its own, as in load\(\"model=llama"):
        tpresearch.load(given)


def test_what_is_no_config_is_refused_in_one_sentence() -> None:
    not_loaded: Any = "model=toy_mlp"
    for takes in (tpresearch.compile_plan, tpresearch.build):
        with pytest.raises(TypeError, match=r"^'model=toy_mlp': not a config, which load returns"):
            takes(not_loaded)
    cfg, other = (cast("Any", tpresearch.load("model=toy_mlp")) for _ in range(2))
    cfg.model.plans["tp"]["output"] = {"match": "output", "style": "colwise"}
    with pytest.raises(ConfigError, match=r"^model\.plans=.*: of the wrong type; .* a Rule$"):
        tpresearch.compile_plan(cfg)
    other.parallel = "tp"
    with pytest.raises(ConfigError, match=r"^parallel=tp: of the wrong type; a ParallelConfig$"):
        tpresearch.compile_plan(other)


def test_a_plan_is_compiled_for_any_number_of_ranks_and_leaves_the_config_alone() -> None:
    cfg = tpresearch.load("model=llama2_7b", "tokenizer=bpe_32k", "mesh.tp=8")
    before = as_dict(cfg)
    plan = tpresearch.compile_plan(cfg, world_size=64)
    assert as_dict(cfg) == before
    assert plan.job.sizes.nontrivial() == {"dp_shard": 8, "tp": 8}
    assert plan.job.parameters == 6_738_415_616
    lines = repr(plan).splitlines()
    assert lines[0] == "model=llama2_7b parallel=fsdp_tp world_size=64: {'dp_shard': 8, 'tp': 8}"
    (wq,) = [line for line in lines if "attention.wq.weight" in line]
    assert wq.split("  ")[-1] == "64x4096"
    cfg.optimizer.lr = 7.0  # for another
    assert plan.job.cfg.optimizer.lr == before["optimizer"]["lr"]
    with pytest.raises(ConfigError, match=r"mesh\.tp=8: "):
        tpresearch.compile_plan(cfg, world_size=12)
    with pytest.raises(ConfigError, match=r"^world_size=0: too small; "):
        tpresearch.compile_plan(cfg, world_size=0)


def test_in_a_notebook_the_plan_is_a_table_of_the_same_cells_escaped() -> None:
    cfg = tpresearch.load("model=toy_mlp", "parallel=tp", "mesh.tp=2", "model.name='<script>'")
    plan = tpresearch.compile_plan(cfg)
    page = plan._repr_html_()
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    found = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    assert [tuple(map(html.unescape, row)) for row in found] == plan_table(plan.job.model, plan.job.plan)
    assert "<li>parameters: 557,376</li>" in page


@pytest.mark.parametrize(
    ("words", "wq", "rows"),
    [(["parallel=none"], (64, 64), 8), (["parallel=fsdp_tp", "mesh.tp=2"], (16, 64), 4)],
    ids=["one process", "four ranks"],
)
def test_a_job_takes_the_steps_of_the_reference(
    ranks: Ranks, words: list[str], wq: tuple[int, ...], rows: int
) -> None:
    cfg = tpresearch.load(*TRAINED)
    expected = reference(cfg, prepare(cfg.data, cfg.tokenizer), 2)
    for seen in ranks.run(1 if "parallel=none" in words else 4, built, [*TRAINED, *words]):
        assert (seen["wq"], seen["rows"]) == (wq, rows)
        assert len(seen["steps"]) == 2
        for number, step in enumerate(expected.steps, 1):
            wanted = {"train/step": number, "train/loss": step.loss, "train/grad_norm": step.grad_norm}
            assert seen["steps"][number - 1] == pytest.approx(wanted, rel=1e-10)
        for step, of_own_optimizer in zip(seen["steps"], seen["again"], strict=True):
            assert of_own_optimizer == pytest.approx(step, rel=1e-10)


def built(world: World, overrides: list[str]) -> dict[str, Any]:
    torch.set_num_threads(1)
    cfg = tpresearch.load(*overrides)
    job, again = tpresearch.build(cfg), tpresearch.build(cfg)  # two jobs in one process
    beta1, beta2 = cfg.optimizer.betas
    groups = [
        {key: group[key] for key in ("params", "weight_decay")} for group in again.optimizer.param_groups
    ]
    again.state.optimizer = torch.optim.AdamW(groups, betas=(beta1, beta2), eps=cfg.optimizer.eps)
    weight = job.model.get_parameter("layers.0.attention.wq.weight")
    return {
        "wq": tuple((weight.to_local() if isinstance(weight, DTensor) else weight).shape),
        "rows": len(job.batch().inputs),
        "steps": [job.step(), job.step()],
        "again": [again.step(), again.step()],
    }


class MeanSquares(Objective):
    def __call__(self, model: nn.Module, batch: Batch, phase: Phase) -> Tensor:
        with phase("forward"):
            output = model(batch.inputs)
        with phase("loss"):
            return (output - batch.targets).square().sum() / 8


@pytest.mark.parametrize("plan", ["fsdp", "tp"])
def test_a_loss_and_rows_of_ones_own_train_as_a_plain_loop(ranks: Ranks, plan: str) -> None:
    """8 rows of 10 numbers with 5 targets each, in two micro-batches."""
    for loss, norm, expected, expected_norm in ranks.run(2, regressed, plan):
        assert (loss, norm) == pytest.approx((expected, expected_norm), rel=1e-10)


def regressed(world: World, plan: str) -> tuple[float, float, float, float]:
    torch.set_num_threads(1)
    net = ("model=toy_net", "data=uniform", "train.loss=sum", "data.seq_len=1", "train.global_batch_size=8")
    words = "train.dtype=float64", f"train.micro_batch_size={2 if plan == 'fsdp' else 4}", f"parallel={plan}"
    job = tpresearch.build(tpresearch.load(*SMALL, *net, *words))
    setup = replace(job.loop.setup, objective=MeanSquares())
    drawn = torch.Generator().manual_seed(0)
    inputs, targets = (torch.rand(8, width, generator=drawn, dtype=torch.float64) for width in (10, 5))
    of_rank = slice(data_rank(job.mesh), None, setup.plan.sizes.dp)
    plain = tpresearch.compile_plan(tpresearch.load(*SMALL, *net)).job.model.to_empty(device="cpu").double()
    weights = {
        name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in job.model.named_parameters()
    }
    plain.load_state_dict(weights)
    wanted = (plain(inputs) - targets).square().sum() / 8
    wanted.backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm()
    result = train_step(job.state, Batch(inputs[of_rank], targets[of_rank]), setup)
    assert not result.loss.requires_grad, "losses that are kept would keep the graphs of their steps"
    shares = sum_over(job.mesh, result.loss.clone(), DATA_AXES)
    return shares.item(), result.grad_norm.item(), wanted.item(), norm.item()


def test_an_interrupted_step_leaves_nothing_for_the_next(ranks: Ranks) -> None:
    """Ctrl-C in a notebook, between two micro-batches."""
    ((interrupted, undisturbed),) = ranks.run(1, stepped_with_an_interrupt)
    assert interrupted == undisturbed


def stepped_with_an_interrupt(world: World) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    torch.set_num_threads(1)
    cfg = tpresearch.load(*TRAINED, "parallel=none", "train.micro_batch_size=4")
    job, other = tpresearch.build(cfg), tpresearch.build(cfg)
    forwards = itertools.count(1)

    def interrupt(*_: object) -> None:
        if next(forwards) == 2:
            raise KeyboardInterrupt

    hook = job.model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        job.step()
    hook.remove()
    return [job.step(), job.step()], [other.step(), other.step()]


def test_a_sharded_plan_runs_on_one_rank_and_after_the_group_was_destroyed(ranks: Ranks) -> None:
    """Scripts often end by destroying the group, and in a notebook the next cell goes on."""
    (first, *later), refused = ranks.run(1, built_again)[0]
    assert later == [first] * 2
    assert refused.startswith("world_size=-2: too small; ")


def built_again(world: World) -> tuple[list[dict[str, float]], str]:
    torch.set_num_threads(1)
    cfg = tpresearch.load(*TRAINED, "parallel=fsdp")
    said = logging.handlers.BufferingHandler(100)
    logging.getLogger("tpresearch").addHandler(said)
    steps = [tpresearch.build(cfg, world_size=1).step()]
    notes = tpresearch.compile_plan(cfg, world_size=1).job.notes
    assert [record.getMessage() for record in said.buffer] == list(notes)
    assert said.buffer, "a run warns of axes of one rank"
    for _ in range(2):
        torch.distributed.destroy_process_group()
        steps.append(tpresearch.build(cfg, world_size=1).step())
    with pytest.raises(ConfigError) as refused:
        tpresearch.build(cfg, world_size=-2)
    return steps, str(refused.value)


def test_notes_are_written_once_for_all_ranks(caplog: pytest.LogCaptureFixture) -> None:
    job = tpresearch.compile_plan(tpresearch.load(*TRAINED, "parallel=fsdp"), world_size=1).job
    corpus = prepare(job.cfg.data, job.cfg.tokenizer)
    for rank in range(2):
        log_notes(replace(job, world=World(rank, 2)), corpus, is_new=True)
    assert [record.getMessage() for record in caplog.records] == list(job.notes) != []
    over_hosts = tpresearch.compile_plan(tpresearch.load("parallel=fsdp_tp", "mesh.tp=4"), world_size=8).job
    for per_host in (2, 4):
        log_notes(replace(over_hosts, world=World(0, 8, local_size=per_host)), corpus, is_new=True)
    *_, last = (text for record in caplog.records if "hosts" in (text := record.getMessage()))
    assert last == "mesh.tp=4 crosses hosts of 2 ranks each", "and none of hosts of 4"


def test_modes_of_torch_that_a_caller_has_set_are_not_those_of_a_run(ranks: Ranks) -> None:
    ((first, *under_modes),) = ranks.run(1, built_under_modes)
    assert under_modes == [first] * 5, "as outside"


def built_under_modes(world: World) -> list[dict[str, float]]:
    torch.set_num_threads(1)
    cfg = tpresearch.load(*TRAINED, "train.dtype=float32", "parallel=none")
    steps = [tpresearch.build(cfg).step()]
    no_gradients = torch.no_grad(), torch.inference_mode()
    for mode in (*no_gradients, torch.autocast("cpu", torch.bfloat16), torch.device("meta")):
        with mode:
            steps.append(tpresearch.build(cfg).step())
    torch.set_default_dtype(torch.float64)
    steps.append(tpresearch.build(cfg).step())
    assert torch.get_default_dtype() is torch.float64, "the caller's again"
    return steps


def test_in_one_process_a_plan_of_several_ranks_is_there_to_look_at(ranks: Ranks) -> None:
    (seen,) = ranks.run(1, looked_at)
    replicated = 266_240  # over tp: the norms
    assert seen["held"] == (6_738_415_616 - replicated) // 64 + replicated // 8
    assert seen["wq"] == ((4096, 4096), (64, 4096), "meta")
    assert seen["mesh"] == {"dp_replicate": 1, "dp_shard": 8, "tp": 8}
    sentence = "parallel=fsdp_tp: this process holds what rank 0 of 64 would hold, for inspection only; "
    sentence += "to compute with it, torchrun --nproc-per-node=64 SCRIPT.py; or parallel=none"
    assert set(seen["refused"]) == {sentence}
    assert (seen["lr"], seen["models shown"]) == (0.003, 1)
    assert [step["train/step"] for step in seen["steps"]] == [1, 2, 1]
    assert seen["steps"][2] == pytest.approx(seen["steps"][0])


def looked_at(world: World) -> dict[str, Any]:
    """Between two jobs of one process, and with the first of them going on."""
    torch.set_num_threads(1)
    sys.argv = ["ipykernel_launcher"]
    alone = tpresearch.load(*TRAINED, "parallel=none")
    job = tpresearch.build(alone)
    steps = [job.step()]
    alone.optimizer.lr = 7.0  # for the next job
    words = ("model=llama2_7b", "tokenizer=bpe_32k", "data=random_tokens", "parallel=fsdp_tp", "mesh.tp=8")
    look = tpresearch.build(tpresearch.load(*words), world_size=64)
    wq, refused = look.model.get_parameter("layers.0.attention.wq.weight"), []
    assert isinstance(wq, DTensor)
    for use in (look.step, look.batch, look.evaluate, lambda: look.loop):
        with pytest.raises(ConfigError) as error:
            use()
        refused.append(str(error.value))
    names = look.mesh.mesh_dim_names or ()
    return {
        "held": sum(p.to_local().numel() for p in look.model.parameters() if isinstance(p, DTensor)),
        "wq": (tuple(wq.shape), tuple(wq.to_local().shape), wq.device.type),
        "mesh": {name: look.mesh[name].size() for name in names},
        "refused": refused,
        "lr": job.loop.setup.cfg.optimizer.lr,
        "models shown": repr(job).count("Llama2("),
        "steps": [*steps, job.step(), tpresearch.build(alone).step()],
    }


def test_runs_that_ended_before_their_first_row_have_no_rows(tmp_path: Path) -> None:
    Made(steps=0, error=ValueError("before")).write(tmp_path / "0")
    rows = tpresearch.metrics(tmp_path)
    assert (rows.shape[0], rows.index.names) == (0, ["run", "train/step"])
    assert "train/loss" in rows


def test_runs_and_their_metrics_are_frames_of_what_is_on_disk(tmp_path: Path) -> None:
    one = Made(plan="none", lr=1e-3).write(tmp_path / "0")
    two = Made(plan="tp", mesh={"tp": 4}, sent=[entry("tp", "all_reduce", 64)]).write(tmp_path / "1")
    (tmp_path / "2").mkdir()
    (tmp_path / "2" / "config.yaml").write_text("{}")  # a run that has not ended
    frame = tpresearch.runs(tmp_path)
    assert list(frame.index) == [str(one), str(two)]
    assert frame.columns.is_unique
    assert list(frame["parallel"]) == ["none", "tp"]
    assert set(frame["device"]) == {"cpu"}  # that it ran on, where the config says auto
    assert list(frame["mesh.tp"]) == [1, 4]
    assert list(frame["optimizer.lr"]) == [1e-3, 3e-3]
    assert frame.loc[str(two), "comm/bytes_per_step_by_axis.tp"] == 64
    summary = json.loads((two / "summary.json").read_text())
    assert frame.loc[str(two), "val/loss"] == summary["val/loss"]
    rows = tpresearch.metrics(one, two)["train/loss"]
    written = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    assert list(rows.loc[str(two)]) == [row["train/loss"] for row in written]
    with pytest.raises(ConfigError, match="no such folder"):
        tpresearch.runs(tmp_path / "nothing")
