"""A refused config: one line on stderr, exit code 2, no folder left, and a command that mends it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from support.launches import PROGRAM, Command

from tpresearch import load
from tpresearch.config import ConfigError
from tpresearch.config.world import World
from tpresearch.launch.composition import Composition, conf_dir
from tpresearch.launch.refuse import refuse

pytestmark = pytest.mark.cli

MODELS = "hf, llama2_13b, llama2_1b, llama2_70b, llama2_7b, llama2_debug, llama2_small, llama2_tiny, toy_mlp, toy_net"
LOGGERS = "none, tensorboard, wandb"
BETAS = "'optimizer.betas=[0.9, 0.95]'"

# The overrides typed, how the line begins, and the overrides of the command to try (None: not compared).
REFUSED = [
    ("model=lama2_tiny", "model=lama2_tiny: no such option; one of llama2_tiny, llama2_1b, llama2_7b", "model=llama2_tiny"),
    ("model=3", f"model=3: a config group takes an option's name; one of {MODELS}", ""),
    ("model=[null]", f"model=[null]: Hydra does not accept this value; one of {MODELS}", ""),
    ("hydra.verbose=null", "hydra.verbose=null: Hydra does not accept this value; ", ""),
    ("-m hydra.verbose=3 name=a", "hydra.verbose=3: Hydra does not accept this value; ", "-m name=a"),
    ("hydra.job.env_copy=[HOME,UNSET]", "hydra.job.env_copy=[HOME,UNSET]: not all of these variables are set; ", ""),
    (
        "-m hydra.sweeper.max_batch_size=0 name=a,b",
        "hydra.sweeper.max_batch_size=0: no job would be in a batch; a number above 0, or null",
        "-m name=a,b",
    ),
    ("-m hydra.launcher.slots=-1 name=a", "hydra.launcher.slots=-1: too small; a number above 0", "-m name=a"),
    ("model=null", f"model=null: a config group takes an option's name; one of {MODELS}", ""),
    ("+cluster=cpu", "cluster=cpu: train does not use this config group; it takes checkpoint, data, debug, ", ""),
    ("model.name=", "model.name=: a model needs it; text, as in its conf/model file", ""),
    ("+optimizer=adamw", "optimizer=adamw: it is chosen already; no + before it", "optimizer=adamw"),
    ("model=toy_mlp +model.dim=16", "model.dim=16: there is such a key; no + before it", "model=toy_mlp model.dim=16"),
    ("paralel=tp", "paralel=tp: no such config group or key; nearest is parallel", "parallel=tp"),
    ("train.stepz=3 mesh.tp=2", "train.stepz=3: no such key; nearest is train.steps", "mesh.tp=2 train.steps=3"),
    ("+train.stepz=3", "train.stepz=3: no such key; nearest is train.steps", "train.steps=3"),
    ("lr=1", "lr=1: no such config group or key; nearest is optimizer.lr", "optimizer.lr=1"),
    ("trian.steps=3", "trian.steps=3: no such key; nearest are train.steps, verify.steps", "train.steps=3"),
    ("+mesh.x=2", "mesh.x=2: no such key; there are mesh.dp_replicate, mesh.dp_shard, mesh.tp", ""),
    ("+x=1", "x=1: no such config group or key; there are checkpoint, cluster, data, debug, defects, ", ""),
    ("model.dimm=64", "model.dimm=64: no such key; nearest is model.dim", "model.dim=64"),
    ("model=toy_mlp model.dimm=64", "model.dimm=64: no such key; nearest is model.dim", None),
    (
        "model.plans.tp.logits.units=[dim]",
        "model.plans.tp.logits.units=[dim]: not in the model's file, so that its default holds; + before it: ",
        "'+model.plans.tp.logits.units=[dim]'",
    ),
    (
        "model.plans.tp.x={match:norm,style:input}",
        "model.plans.tp.x={match:norm,style:input}: the plan has no such rule yet; + before it: ",
        "'+model.plans.tp.x={match:norm,style:input}'",
    ),
    ("hydra.run.dri=x", "hydra.run.dri=x: no such key; nearest is hydra.run.dir", "hydra.run.dir=x"),
    (
        "hydra.job.env_set.A=1",
        "hydra.job.env_set.A=1: hydra.job.env_set has no keys yet; + before it: +hydra.job.e",
        "+hydra.job.env_set.A=1",
    ),
    ("train.steps=abc", "train.steps=abc: of the wrong type; a whole number, such as 100", "train.steps=100"),
    ("train.steps=1e3", "train.steps=1e3: of the wrong type; a whole number in digits, 1000", "train.steps=1000"),
    ("optimizer.lr=fast", "optimizer.lr=fast: of the wrong type; a number, such as ", None),
    ("plan_only=maybe", "plan_only=maybe: of the wrong type; true or false, such as false", "plan_only=false"),
    ("optimizer.betas=1", "optimizer.betas=1: of the wrong type; a list, such as [0.9, 0.95]", BETAS),
    ("logger.tags=abc", "logger.tags=abc: of the wrong type; a list; ", ""),
    ("optimizer.betas=[1,a]", "optimizer.betas=[1,a]: a is of the wrong type; a list, such as [0.9, ", BETAS),
    (f"optimizer.lr={10**400}", f"optimizer.lr={10**400}: int too large to convert to float; ", ""),
    ("train.dtype=fp8", "train.dtype=fp8: no such choice; one of float32, bfloat16,", "train.dtype=float32"),
    ("parallel.tensor=pp", "parallel.tensor=pp: no such choice; one of tp, sp", "parallel.tensor=sp"),
    ("data.source=null", "data.source=null: it cannot be null; a value, such as pystdlib", None),
    ("train=3", "train=3: a group of keys, not a value; its keys one by one: train.steps, train.", ""),
    ("~train.steps", "train.steps=~: a key cannot be deleted; a value, such as 100", ""),
    ("hydra.job.chdir=???", "hydra.job.chdir=???: it must be set; hydra.job.chdir=VALUE", None),
    ("data.path=???", "data.path=???: it must be set; data.path=VALUE", "data.path=VALUE"),
    ("train.steps=[", "train.steps=[: cannot be read (no viable alternative at input '['); ", ""),
    ("train.steps", "train.steps=: an override needs a value; train.steps=VALUE", ""),
    ("=3", "=3: an override needs a key; key=value", ""),
    ("+optimizer._target_=a.B", "optimizer._target_=a.B: no such key; models and sharding styles have one (docs/plans.md); an optimizer ", ""),
    ("train.steps=1,2", "train.steps=1,2: several values are a sweep; -m before ", "-m train.steps=1,2"),
    ("name=${nam}", "name=${nam}: nam does not exist; nearest is ${name}", ""),
    ("name=${mesh.tpp}", "name=${mesh.tpp}: mesh.tpp does not exist; nearest is ${mesh.tp}", ""),
    (
        "hydra.run.dir=x/${nam}",
        "hydra.run.dir=x/${nam}: nam does not exist; a key that `--cfg job` shows",
        "",
    ),
    ("+hydra.job.env_set.A=${nam}", "hydra.job.env_set.A=${nam}: nam does not exist; a key that `--cfg", ""),
    ("name=${when:1}", "name=${when:1}: Unsupported interpolation type when; an interpolation that", ""),
    ("model=/a/b.yaml", "model=/a/b.yaml: a config group takes an option's name, not a path; model=b hydra.searchpath=", ""),
    ("hydra.mode=1e400", "hydra.mode=1e400: no such choice; one of RUN, MULTIRUN", ""),
    ("hydra/launcher=slrm", "hydra/launcher=slrm: no such option; one of slurm", "hydra/launcher=slurm"),
    ("name=é", "name=é: cannot be read; 'name=[a,b]' for a list, ", None),
    ("~logger train.steps=3", f"logger=~: a config group cannot be deleted; one of {LOGGERS}", "logger=none train.steps=3"),
    ("~model=llama2_tiny", f"model=~: a config group cannot be deleted; one of {MODELS}", ""),
    (
        "hydra.searchpath=[file://nowhere] model=mine",
        "hydra.searchpath=file://nowhere: no such folder; folders of config files, such as [file://mine/conf]",
        "hydra.searchpath=VALUE model=mine",
    ),
    (
        "hydra.searchpath=file:///tmp",
        "hydra.searchpath=file:///tmp: no list; folders of config files, such as [file://mine/conf]",
        "'hydra.searchpath=[file:///tmp]'",
    ),
    ("hydra.searchpath=[", "hydra.searchpath=[: cannot be read (no viable alternative at input '['); ", ""),
    ("--config-dir nowhere", "--config-dir=nowhere: no such folder; a folder with config files, ", ""),
    ("--config-path nowhere", "--config-path=nowhere: no such folder; a folder with config files, ", ""),
    ("-m name=a hydra.sweep.dir=", "hydra.sweep.dir=: names no folder; a folder, new or empty", "-m name=a"),
    ("model.rope_theta=5", "model.rope_theta=5: not in the model's file, so that ", "+model.rope_theta=5"),
    ("model.rope_teta=5", "model.rope_teta=5: no such key; nearest is model.rope_theta", None),
    ("--config-name trane", "--config-name=trane: no such config; one of ", ""),
    ("--steps 3", "flags=--steps: not understood; key=value overrides, then flags; see --hydra-help", None),
    ("~logger --steps", "flags=--steps: not understood; key=value overrides, then flags; see --hydra-help", "logger=none"),
    ("hydra.output_subdir=..", "hydra.output_subdir=..: Hydra's record of the config is kept inside", ""),
    ("hydra.output_subdir=../x", "hydra.output_subdir=../x: Hydra's record of the config is kept inside", ""),
    ("hydra.run.dir=/dev/null/x", "hydra.run.dir=/dev/null/x: cannot be written: Not a directory; ", None),
    ("name=too_few_ranks", "mesh.tp=2: cannot divide 1; 1, or 2 ranks", "name=too_few_ranks"),
    ("name=1e5", "name=1e5: Hydra would make the text 100000.0 of it; text in quotes", "'name='\"'\"'1e5'\"'\"''"),
]  # fmt: skip
TYPED = [row[0] for row in REFUSED]


@pytest.mark.parametrize(("typed", "sentence", "to_try"), REFUSED, ids=TYPED)
def test_a_wrong_config_is_refused_in_one_line(
    warm_python: Command, tmp_path: Path, typed: str, sentence: str, to_try: str | None
) -> None:
    done = warm_python(*typed.split())
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert done.err.startswith(f"error: {sentence}")
    if to_try is not None:
        starter = "torchrun --nproc-per-node=2" if "ranks" in typed else "python"
        assert done.err.endswith(f"; try: {starter} {PROGRAM} {to_try}".rstrip() + "\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("train.dtype=[bfloat16]", "no such choice; one of float32, bfloat16, float64$"),
        ("data.source=1.5", "no such choice; one of pystdlib, "),
        ("name=[a]", "of the wrong type; text, such as train"),
    ],
)
def test_a_list_or_a_number_for_one_of_several_words_is_told_the_words(typed: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(typed)}: {said}"):
        load(typed)


@pytest.mark.parametrize(
    ("typed", "made"),
    [
        ("logger.tags=[a,1e-4]", "0.0001"),
        ("logger.group=a,2e3", "2000.0"),
        ("data.name=1.10", "1.1"),
        ("data.split=true", "True"),
        ("hydra.run.dir=1_000", "1000"),
    ],
)
def test_text_that_hydra_would_write_otherwise_is_refused(typed: str, made: str) -> None:
    with pytest.raises(ConfigError, match=f"Hydra would make the text {made} of it"):
        Composition("train", [typed]).refuse_unusable()
    for kept in ("logger.name=12", "logger.name='1e5'", "logger.tags=[a,1.5,'1e5']", "logger.group=null"):
        Composition("train", [kept]).refuse_unusable()


@pytest.mark.parametrize(
    ("typed", "said", "proposed"),
    [
        (
            "model.plans.tp.out={style: rowwise, axis: tp}",
            "model.plans.tp.out.axis is not in the model's file, so that its default holds; + before it: ",
            "+model.plans.tp.out={style: rowwise, axis: tp}",
        ),
        ("model.plans.tp.out={stile: rowwise}", "no such key: stile; one of style", ""),
        ("train={stepz: 3}", "no such key: stepz; one of steps", ""),
    ],
)
def test_of_a_mapping_that_is_typed_the_wrong_key_is_named(typed: str, said: str, proposed: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(typed)}: {re.escape(said)}") as refused:
        load("model=llama2_debug", typed)
    assert not proposed or load(proposed).model.plans["tp"]["out"].axis == "tp"
    assert [*refused.value.fix] == (
        ["model.plans.tp.out", "+model.plans.tp.out"] if proposed else [refused.value.field]
    )


def test_a_word_that_is_not_utf8_is_refused_by_a_rank_of_torchruns_too(
    warm_python: Command, tmp_path: Path
) -> None:
    job = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    job |= {"TORCHELASTIC_RUN_ID": "none", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    file = tmp_path / "torchrun" / "attempt_0" / "0" / "error.json"
    file.parent.mkdir(parents=True)
    for _ in range(2):  # the second hears what the first reported
        done = warm_python(os.fsdecode(b"name=\xfc["), **job, TORCHELASTIC_ERROR_FILE=str(file))
        assert done.code == 2, done.err
        assert len(done.err.splitlines()) <= 1, done.err
    assert b"name=\xfc[: cannot be read" in (tmp_path / "torchrun" / "refused").read_bytes()


def test_a_sweep_with_a_wrong_job_leaves_nothing(warm_python: Command, tmp_path: Path) -> None:
    done = warm_python("-m", "name=other,too_few_ranks", "parallel=none")
    assert (done.code, done.out) == (2, ""), done.err
    assert done.refusals[0].startswith(
        "error: mesh.tp=2: cannot divide 1, in job 1 of the sweep (name=too_few_ranks parallel=none); "
    )
    assert not list(tmp_path.iterdir())


def test_a_refused_sweep_leaves_what_a_user_has(warm_python: Command, tmp_path: Path) -> None:
    wrong = ["-m", "name=other,too_few_ranks", "parallel=none"]
    (tmp_path / "parent" / "empty").mkdir(parents=True)
    done = warm_python(*wrong, "hydra.sweep.dir=parent/empty")
    assert done.refusals[0].startswith("error: mesh.tp=2: cannot divide 1")
    assert (tmp_path / "parent" / "empty").is_dir()
    record = tmp_path / "parent" / "multirun.yaml"
    record.write_text("hydra:\n  of: an earlier sweep\n")
    done = warm_python(*wrong, "hydra.sweep.dir=parent")
    assert done.refusals[0].startswith("error: mesh.tp=2: cannot divide 1")
    assert record.read_text() == "hydra:\n  of: an earlier sweep\n"
    assert {path.name for path in record.parent.iterdir()} == {"empty", "multirun.yaml"}


@pytest.mark.parametrize("name", ["multirun.yaml", "summary.csv", "summary.md"])
def test_a_sweep_writes_over_no_file_of_a_user(warm_python: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine\n")
    done = warm_python("-m", "name=a,b", "parallel=none", "hydra.sweep.dir=.")
    assert done.refusals[0].startswith(
        f"error: hydra.sweep.dir=.: a sweep would write over its {name}, which "
    )
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine\n"]


def test_wrong_config_files_are_named_with_the_override_that_chose_them(
    warm_python: Command, extra_configs: str
) -> None:
    other_model = warm_python(extra_configs, "experiment=other_model").err
    assert other_model.startswith(
        "error: model=llama9: no such option, asked for by experiment=other_model; one of llama2_"
    )
    other_key = warm_python(extra_configs, "experiment=other_key").err
    assert other_key.startswith(
        "error: experiment=other_key: experiment/other_key.yaml sets train.stepz, which does not"
    )
    assert "; nearest is train.steps; try: " in other_key
    own_class = warm_python(extra_configs, "optimizer=muon").err
    assert own_class.startswith(
        "error: optimizer=muon: optimizer/muon.yaml sets optimizer._target_, which does not exist; models and "
    )
    torn = warm_python(extra_configs, "experiment=torn").err
    assert torn.startswith("error: experiment=torn: not YAML at line 3, column 1 of ")
    unset = warm_python(extra_configs, "model=unset").err
    assert unset.startswith("error: model.dim=???: it must be set; model.dim=VALUE; try: ")
    assert unset.endswith(" model=unset model.dim=VALUE\n")  # and not a command with another model
    unknown = warm_python(extra_configs, "experiment=shorter").err
    assert unknown.startswith("error: experiment=shorter: no such option; one of short, ")
    assert "a file of your own" not in unknown
    alone = warm_python("experiment=short").err
    assert ", or a file of your own with hydra.searchpath=[file://FOLDER]; try: " in alone
    assert {len(err.splitlines()) for err in (other_model, other_key, torn, unset, unknown)} == {1}


def test_a_file_that_has_itself_among_its_defaults_is_named(warm_python: Command, tmp_path: Path) -> None:
    """As one of your own has that shadows the file that it means to change."""
    (tmp_path / "optimizer").mkdir()
    (tmp_path / "optimizer" / "mine.yaml").write_text("defaults: [mine]\nlr: 0.1\n")
    done = warm_python(f"hydra.searchpath=[file://{tmp_path}]", "optimizer=mine")
    assert done.refusals == [done.err.strip()]
    assert done.err.startswith(
        "error: optimizer=mine: the defaults of one of its files lead back to itself; "
    )


def test_a_file_that_is_not_read_since_another_has_its_name_is_named(
    warm_python: Command, tmp_path: Path
) -> None:
    """Hydra looks in the folder of train.yaml first: a copy that was changed would change nothing."""
    mine, typed = tmp_path / "mine", ("model=llama2_debug", "parallel=none")
    for name in ("model/llama2_debug", "plan/llama2"):
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / f"{name}.yaml").write_bytes((conf_dir() / f"{name}.yaml").read_bytes())
    searched = f"hydra.searchpath=[file://{mine}]"
    assert warm_python(*typed, searched).code == 0, "what is the same is read in either place"
    for name in ("plan/llama2", "model/llama2_debug"):  # the model's file has the other in its defaults
        path = mine / f"{name}.yaml"
        path.write_text(f"{path.read_text()}# mine\n")
        said = f"{mine}: its {name}.yaml is not read, since {conf_dir() / name}.yaml has that name and comes first; "
        by_path, by_flag = (warm_python(*typed, *words) for words in ([searched], ["--config-dir", "mine"]))
        assert by_path.refusal.startswith(f"error: hydra.searchpath={said}")
        assert by_flag.refusal.startswith(f"error: --config-dir={said}")
        for done in (by_path, by_flag):
            assert done.err.endswith(".py model=llama2_debug parallel=none\n")
        with pytest.raises(ConfigError, match=r"^hydra\.searchpath="):
            load(*typed, searched)
    assert warm_python("model=toy_mlp", "parallel=none", searched).code == 0, "of files that nobody chose"


def test_the_command_to_try_is_the_one_that_was_typed(python_module: Command) -> None:
    done = python_module("train.stepz=3")
    assert done.err.endswith("; try: python -m program train.steps=3\n")


def test_srun_in_the_place_of_torchrun_is_refused_by_its_first_task(warm_python: Command) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}
    first = warm_python("mesh.tp=2", SLURM_PROCID="0", **step)
    second = warm_python("mesh.tp=2", SLURM_PROCID="1", **step)
    wrong = warm_python("mesh.tp=2", SLURM_PROCID="x", **step)
    assert first.err.startswith(
        "error: SLURM_STEP_NUM_TASKS=8: srun started this many jobs of one process each; "
    )
    assert "try: srun --ntasks-per-node=1 torchrun --nnodes=2 --nproc-per-node=4 " in first.err
    assert (first.code, second.code, second.err) == (2, 2, "")
    assert wrong.refusal.startswith("error: SLURM_PROCID=x: not a whole number; ")


def test_of_several_hosts_the_first_says_what_is_refused_if_it_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "attempt_0" / "2" / "error.json"
    file.parent.mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["train.py"])
    env = {"GROUP_RANK": "1", "TORCHELASTIC_ERROR_FILE": str(file), "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    sentence = "data.path=x: holds no rows; a path with text in it"
    error = ConfigError("data.path", "x", "holds no rows", "a path with text in it")
    for shared in (True, False):
        monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(shared))
        with pytest.raises(SystemExit, match=r"^2$"):
            refuse(error, World(2, 4, 0, 2, elastic=True), lambda _: None)
        said = capsys.readouterr().err
        assert said == "" if shared else said.startswith(f"error: {sentence}; try: torchrun ")
        assert json.loads(file.read_text())["message"].startswith(f"refused: {sentence}")


def test_main_can_refuse_too(warm_python: Command) -> None:
    done = warm_python("name=refused_late", "data.path=x")
    assert done.code == 2
    sentence = "data.path=x: holds no rows; a path with text in it"
    assert done.refusals == [f"error: {sentence}; try: python {PROGRAM} name=refused_late"]
    assert "Traceback" not in done.err


@pytest.mark.parametrize("name", ["bug", "bug_in_judge"])
def test_a_bug_is_no_refusal_and_keeps_its_traceback(warm_python: Command, name: str) -> None:
    done = warm_python(f"name={name}")
    assert (done.code, done.refusals, done.err.count("Traceback")) == (1, [], 1)
    assert done.err.endswith("ValueError: not the user's fault\n")


def test_a_bug_on_another_rank_than_the_first_is_in_torchruns_report_wherever_it_is(
    warm_python: Command, tmp_path: Path
) -> None:
    job = World(1, 2, 1, 2).environment(port=1) | {"TORCHELASTIC_RUN_ID": "any"}
    done = warm_python("name=bug_in_judge", **job, TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    assert (done.code, done.err) == (1, "")
    report = json.loads((tmp_path / "error.json").read_text())["message"]
    assert report["message"] == "ValueError: not the user's fault"
    assert "in preflight" in report["extraInfo"]["py_callstack"]
