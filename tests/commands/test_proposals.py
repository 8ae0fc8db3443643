"""What a refusal proposes: what was typed with the mistake mended, judged before it is shown."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from support.commands import environment, execute
from support.trainings import TINY, TRAIN, Start, cases

from tpresearch.config.errors import ConfigError, WrongModel
from tpresearch.config.world import World
from tpresearch.launch.proposal import command_to_try

pytestmark = pytest.mark.cli

BASE = [word for word in TINY if not word.startswith("parallel=")]
PROPOSED = cases(
    """
train.log_every=1
    parallel=fsdp_tp: needs several ranks (along dp_shard and tp), but this is a single process
    torchrun --nproc-per-node=4 ... train.log_every=1
parallel=tp mesh.tp=2
    parallel=tp: needs several ranks (along tp), but
    torchrun --nproc-per-node=2 ... parallel=tp mesh.tp=2
optimizer.learning_rate=3 parallel=none
    no such key; nearest is optimizer.lr
    python ... parallel=none optimizer.lr=3
parallel=none train.batch_size=8
    no such key; nearest are train.global_batch_size, train.micro_batch_size
    python ... parallel=none train.global_batch_size=8
parallel=fdsp
    no such option; one of fsdp, sp, ddp, fsdp_tp, hsdp,
    torchrun --nproc-per-node=4 ... parallel=fsdp
# More than one mistake: the first is named, all are mended.
paralel=fsdp modle=toy_mlp optimizer.lrr=3 mesh.dp_shard=2
    paralel=fsdp: no such config group or key; nearest is parallel
    torchrun --nproc-per-node=2 ... mesh.dp_shard=2 parallel=fsdp optimizer.lr=3
parallel=ddp train.step=3 mesh.dp_replicate=3
    train.step=3: no such key
    ... parallel=ddp train.steps=3 mesh.dp_replicate=3
~model
    model=~: a config group cannot be deleted
    torchrun --nproc-per-node=4 ...
parallel=none name=é
    name=é: cannot be read
    python ... parallel=none name='é'
parallel=none train.steps=glob(*)
    train.steps=glob(*): several values are a sweep
    python ... -m parallel=none
parallel=none train.seed=0,1
    several values are a sweep
    python ... -m parallel=none train.seed=0,1
-m parallel=none,tpp
    flags=parallel=none,tpp: not understood
    python ... -m parallel=tp
parallel=none hydra.searchpath=null
    it cannot be null; a value, such as []
    python ... parallel=none hydra.searchpath=[]
parallel=none --config-name
    --config-name=: argument --config-name/-cn: expected one
    python ... parallel=none
parallel=none hydra.output_subdir=''
    hydra.output_subdir=: Hydra's record of the config is kept inside the run's folder; the name of a
    python ... parallel=none
parallel=none model@here=toy_mlp
    Could not override 'model@here'
    python ... parallel=none
""",
    lines=3,
)
"""What is typed beside a tiny run; why it is refused; and with what the command to try starts, and what is new in it."""


@pytest.mark.parametrize(("typed", "why", "proposed"), PROPOSED, ids=[typed for typed, *_ in PROPOSED])
def test_what_is_proposed_is_what_was_typed_and_is_not_refused(
    train_py: Start, tmp_path: Path, typed: str, why: str, proposed: str
) -> None:
    starter, _, new = proposed.partition("...")
    done = train_py(*BASE, *shlex.split(typed))
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert why in done.refusal
    words = done.command_to_try
    at = words.index(str(TRAIN))
    if starter:
        assert " ".join(words[:at]) == starter.strip()
    typed_anew = words[at + 1 :]
    assert set(new.split()) <= {*typed_anew, *BASE}
    assert set(typed_anew) <= {*new.split(), *BASE, "train.global_batch_size=3"} | ({"-m"} & {*new.split()})
    if "-m" not in typed_anew:
        size = 1 if words[0] == "python" else int(words[1].rpartition("=")[2])
        tried = train_py(*typed_anew, "hydra.run.dir=/dev/null/x", size=size)
        assert tried.refusal.startswith("error: hydra.run.dir=/dev/null/x: cannot be written"), tried.err
    assert not list((tmp_path / "cwd").iterdir())


def test_what_only_its_user_knows_is_left_to_be_filled_in(train_py: Start) -> None:
    done = train_py("model=hf", "parallel=none")
    assert done.command_to_try[2:] == ["model=hf", "parallel=none", "init_from=VALUE"]


@pytest.mark.parametrize(
    ("rule", "field"),
    [((), "model.plans.sp"), (("+model.plans.sp.stem={match: stem}",), "model.plans.sp.stem.src")],
)
def test_a_plan_that_cannot_be_corrected_is_left_to_be_filled_in_and_no_other_model_is_proposed(
    monkeypatch: pytest.MonkeyPatch, rule: tuple[str, ...], field: str
) -> None:
    typed = ["model=mine", "parallel=sp", *rule]
    monkeypatch.setattr(sys, "argv", ["train.py", *typed])
    first = ConfigError(field, "x", "one layer is wrong", "another", {"+model.plans.sp.a": "{match: a}"})
    then = ConfigError("model.plans.sp.a", "{match: a}", "so is the next", "another forward")
    to_try = command_to_try(first, World(), lambda tried: then if "model=mine" in tried.arguments else None)
    assert str(to_try).endswith(shlex.join([*typed, f"{field}=VALUE"]))


def test_no_other_model_is_proposed_where_a_correction_shows_a_mistake_in_the_code(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    typed = ["model=mine", "parallel=sp"]
    monkeypatch.setattr(sys, "argv", ["train.py", *typed])
    first = ConfigError(
        "model.plans.sp", "sp", "a rule is missing", "one", {"+model.plans.sp.a": "{match: a}"}
    )
    code = WrongModel("mine", "it ends at line 3", "another forward")
    to_try = command_to_try(first, World(), lambda tried: code if "model=mine" in tried.arguments else None)
    assert str(to_try).endswith(shlex.join([*typed, "model.plans.sp=VALUE"]))


# Variables that another job has left, and what of them the command to try goes without.
LEFT = [
    (
        {"RANK": "1", "WORLD_SIZE": "2"},
        "RANK=1: LOCAL_RANK is not set beside it",
        "env -u RANK -u WORLD_SIZE python",
    ),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: RANK is not set beside it", "env -u WORLD_SIZE python"),
    (
        {"SLURM_STEP_NUM_TASKS": "x"},
        "SLURM_STEP_NUM_TASKS=x: not a whole",
        "env -u SLURM_STEP_NUM_TASKS python",
    ),
]


@pytest.mark.parametrize(("left", "why", "starter"), LEFT)
def test_the_environment_of_another_job_is_one_line(
    train_py: Start, left: dict[str, str], why: str, starter: str
) -> None:
    done = train_py(*TINY, **left)
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert done.refusal.startswith(f"error: {why}")
    assert shlex.join(done.command_to_try).startswith(starter)
    assert done.command_to_try[-len(TINY) :] == [*TINY]


def test_what_is_typed_is_kept_where_nothing_was_composed_before(tmp_path: Path) -> None:
    """Cold: a warm process has registered the schema, which a proposal is composed with."""
    env = environment(tmp_path, RANK="1", WORLD_SIZE="2")
    done = execute([sys.executable, str(TRAIN), *TINY], tmp_path, env)
    assert done.command_to_try[-len(TINY) :] == [*TINY]


def test_a_rank_that_was_started_by_hand_is_not_refused_in_silence(train_py: Start) -> None:
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    done = train_py(*TINY, **place, MASTER_ADDR="localhost", MASTER_PORT="1")
    assert done.code == 2
    assert done.refusal.startswith("error: parallel=none: runs on a single process, but the world size is 2")
