"""From what a run goes on, what may change on the way, and what is refused in one line before anything is touched."""

from __future__ import annotations

import dataclasses
import tempfile
from argparse import Namespace
from pathlib import Path

import pytest
import yaml
from support.composed import config
from support.made_checkpoints import ABOUT, save
from support.nobody import as_nobody

from tpresearch.checkpoint import disk
from tpresearch.checkpoint.disk import Checkpoint, folder_of
from tpresearch.checkpoint.resume import (
    check_corpus,
    check_experiment,
    checkpoints_to_resume,
    differences,
    find_checkpoint,
    run_of,
)
from tpresearch.config import Config, ConfigError
from tpresearch.config.comparable import experiment_config
from tpresearch.config.compose import as_dict
from tpresearch.config.validate import total_steps
from tpresearch.launch.command import override
from tpresearch.launch.earlier_run import (
    keeping_overrides,
    overrides_of_run,
    repeat_command_of_run,
    repeat_or_start_again,
    repeating_overrides,
)

STARTED = ("model=llama2_debug", "parallel=tp", "train.steps=50")


def of(cfg: Config) -> Checkpoint:
    mark = dataclasses.replace(ABOUT, experiment=experiment_config(as_dict(cfg)), steps=total_steps(cfg))
    return Checkpoint(Path("run/checkpoints/step-00000007"), mark)


@pytest.mark.parametrize(
    "changed",
    [
        "parallel=fsdp_tp mesh.tp=2",
        "model.blocks=[] model.plans.tp.logits.dst=replicate",
        "train.micro_batch_size=2 train.log_every=5 train.eval_every=null train.eval_rows=3",
        "logger=wandb logger.project=x name=other device=cpu data.cache_dir=/tmp/x data.max_record_bytes=99999",
        "checkpoint.every=3 checkpoint.keep=9 train.on_nonfinite=skip train.warmup_log_steps=3",
        "optimizer.compile=true optimizer.split_masters=true",
        "optimizer.momentum=0.5",  # which AdamW has no use for
        "train.steps=51",
        "train.steps=null train.tokens=1000000",
    ],
)
def test_what_may_change(changed: str) -> None:
    check_experiment(of(config(*STARTED)), config(*STARTED, *changed.split()))


def test_what_sgd_has_no_use_for_may_change() -> None:
    sgd = (*STARTED, "optimizer=sgd")
    check_experiment(of(config(*sgd)), config(*sgd, "optimizer.betas=[0.5,0.5]", "optimizer.eps=1"))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ("optimizer.lr=0.1", "optimizer.lr=0.1: this run was started with 0.003"),
        (
            "optimizer.moment_dtype=bfloat16",
            "optimizer.moment_dtype=bfloat16: this run was started with null",
        ),
        ("train.seed=1", "train.seed=1: this run was started with 0"),
        ("train.global_batch_size=16", "train.global_batch_size=16: this run was started with 8"),
        ("train.dtype=float64", "train.dtype=float64: this run was started with float32"),
        ("model.dim=32", "model.dim=32: this run was started with 64"),
        ("model=toy_mlp", "model.name=toy_mlp: this run was started with llama2_debug"),
        ("data.seq_len=8", "data.seq_len=8: this run was started with 16"),
        ("optimizer=sgd", "optimizer.name=sgd: this run was started with adamw"),
        ("schedule=wsd", "schedule.name=wsd: this run was started with cosine"),
        ("init_from=/somewhere", "init_from=/somewhere: this run was started with null"),
        ("train.clip_grad_norm=null", "train.clip_grad_norm=null: this run was started with 1.0"),
        ("train.steps=49", "train.steps=49: this run ends at step 50"),
        ("train.steps=null train.tokens=256", "train.tokens=256: this run ends at step 50"),
        ("defects.keep_gradients=true", "defects.keep_gradients=true"),
    ],
)
def test_another_experiment_is_refused_with_its_weights_offered(changed: str, said: str) -> None:
    checkpoint = of(config(*STARTED))
    with pytest.raises(ConfigError) as refused:
        check_experiment(checkpoint, config(*STARTED, *changed.split()))
    assert str(refused.value).startswith(said)
    assert refused.value.fix == {"init_from": checkpoint.folder, "resume": None, "hydra.run.dir": None}


def test_a_setting_that_only_one_of_them_has_is_a_difference() -> None:
    assert [*differences({"model": {"dim": 64}}, {"model": {}})] == [("model.dim", 64, None)]
    assert [*differences({"model": {}}, {"model": {"dim": 64}})] == [("model.dim", None, 64)]


def test_a_mark_without_a_key_that_is_newer_has_its_default() -> None:
    checkpoint = of(config(*STARTED))
    del checkpoint.manifest.experiment["train"]["weights"], checkpoint.manifest.experiment["defects"]
    check_experiment(checkpoint, config(*STARTED))
    with pytest.raises(ConfigError, match=r"train\.weights=bfloat16: this run was started with float32"):
        check_experiment(checkpoint, config(*STARTED, "train.weights=bfloat16"))


@pytest.mark.parametrize("key", ["data.path", "tokenizer.path", "init_from"])
def test_files_may_have_moved_but_those_that_are_still_there_are_others(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the text and the tokenizer is compared later; initial weights are not read again."""
    monkeypatch.chdir(tmp_path)
    now = tmp_path / "now.json"
    now.touch()
    for then in (tmp_path / "then.json", Path("below/a/folder/then.json")):
        started = of(config(*STARTED, "data=jsonl", f"{key}={then}"))
        check_experiment(started, config(*STARTED, "data=jsonl", f"{key}={now}"))
        then.parent.mkdir(parents=True, exist_ok=True)
        then.touch()
        with pytest.raises(ConfigError, match=f"{key}={now}: this run was started with {then}"):
            check_experiment(started, config(*STARTED, "data=jsonl", f"{key}={now}"))
    hub = of(config(*STARTED, "data=hf", f"{key}=owner/name"))
    with pytest.raises(ConfigError, match=f"{key}={now}: this run was started with owner/name"):
        check_experiment(hub, config(*STARTED, "data=hf", f"{key}={now}"))


def test_a_name_that_is_no_path_has_not_moved() -> None:
    typed = (*STARTED, "data=jsonl")
    with pytest.raises(ConfigError, match=r"data\.text_field=text: this run was started with the text"):
        check_experiment(of(config(*typed, "data.text_field='the text'")), config(*typed))


def test_kept_gradients_are_in_no_checkpoint() -> None:
    cfg = config(*STARTED, "defects.keep_gradients=true")
    with pytest.raises(ConfigError, match="are not in any checkpoint") as refused:
        check_experiment(of(cfg), cfg)
    assert refused.value.fix == {"resume": "never"}


def test_other_rows_are_refused() -> None:
    check_corpus(ABOUT, "c", "t", 64)
    for other in (("d", "t", 64), ("c", "t", 65)):
        with pytest.raises(ConfigError, match="the text is not what this run was trained on"):
            check_corpus(ABOUT, *other)
    with pytest.raises(ConfigError, match="=c: the tokenizer is not what"):
        check_corpus(ABOUT, "c", "u", 64)
    with pytest.raises(ConfigError, match="=d: the text or the tokenizer is not what") as refused:
        check_corpus(ABOUT, "d", "u", 64)
    assert refused.value.fix == {"resume": "never"}


def test_a_path_means_a_checkpoint_or_the_newest_of_a_run(tmp_path: Path) -> None:
    for step in (3, 12):
        save(tmp_path / "run", step)
    link = tmp_path / "latest"
    link.symlink_to(folder_of(tmp_path / "run", 3))
    assert find_checkpoint(tmp_path / "run").step == 12
    assert find_checkpoint(folder_of(tmp_path / "run", 3)).step == 3
    assert find_checkpoint(link).step == 3
    (folder_of(tmp_path / "run", 12) / ".metadata").unlink()
    assert find_checkpoint(tmp_path / "run").step == 3


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere", "there is no such folder"),
        ("empty", "it has no checkpoints/step-*"),
        ("broken", "none of its 1 checkpoints is complete; step-00000003: .metadata: No such file"),
        ("broken/checkpoints/step-00000003", "not a complete checkpoint: .metadata: No such file"),
        ("later", "step-00000004: its format is 7, and this version reads up to 1; a newer tpresearch"),
        ("later/checkpoints/step-00000004", "not a complete checkpoint: its format is 7"),
        ("dangling", "there is no such folder"),
        ("file", "it has no checkpoints/step-*"),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, path: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (save(tmp_path / "broken", 3) / ".metadata").unlink()
    save(tmp_path / "later", 3)
    mark = save(tmp_path / "later", 4) / disk.MANIFEST_FILE
    mark.write_text(mark.read_text().replace('"format": 1', '"format": 7'))
    with pytest.raises(ConfigError) as refused:
        find_checkpoint(tmp_path / path, "resume")
    assert str(refused.value).startswith(f"resume={tmp_path / path}: {said}")
    run, _, step = path.partition("/")
    over = "never" if run == "broken" else None
    assert refused.value.fix.get("resume") == (tmp_path / run if step else over)


def test_checkpoints_may_be_links_to_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "run", 3)
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "scratch")
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "scratch")
    named = folder_of(tmp_path / "run", 3)
    assert find_checkpoint(named).step == 3
    assert run_of(named) == run_of(Path("~/run")) == tmp_path / "run"


def test_a_folder_without_permission_is_refused_in_one_line() -> None:
    with tempfile.TemporaryDirectory() as run:  # pytest's own are closed to everybody else
        Path(run).chmod(0o755)
        closed = save(Path(run), 3).parent
        closed.chmod(0)
        with as_nobody(), pytest.raises(ConfigError, match="Permission denied") as refused:
            find_checkpoint(Path(run))
        with as_nobody(), pytest.raises(ConfigError, match=f"{closed}: Permission denied"):
            repeat_command_of_run(parsed(f"resume={folder_of(Path(run), 3)}"))
        closed.chmod(0o755)
    assert str(closed) in str(refused.value)


def test_auto_never_and_a_restart(tmp_path: Path) -> None:
    started = config(*STARTED)
    never = config(*STARTED, "resume=never")
    assert checkpoints_to_resume(started, tmp_path) == []
    mark = of(started).manifest
    for step in (3, 12):
        folder = save(tmp_path, step)
        own = dataclasses.replace(mark, step=step, files=disk.read_checkpoint(folder).manifest.files)
        (folder / disk.MANIFEST_FILE).write_text(disk.manifest_text(own))
    assert [c.step for c in checkpoints_to_resume(started, tmp_path)] == [12, 3]
    assert checkpoints_to_resume(never, tmp_path) == []
    assert [c.step for c in checkpoints_to_resume(never, tmp_path, restarted=True)] == [12, 3]
    older = config(*STARTED, f"resume={folder_of(tmp_path, 3)}")
    assert [c.step for c in checkpoints_to_resume(older, tmp_path)] == [3]
    assert [c.step for c in checkpoints_to_resume(older, tmp_path, restarted=True)] == [12, 3]
    elsewhere = tmp_path / "without one yet"
    assert [c.step for c in checkpoints_to_resume(older, elsewhere, restarted=True)] == [3]
    for step in (3, 12):
        (folder_of(tmp_path, step) / ".metadata").unlink()
    with pytest.raises(ConfigError, match=r"^resume=auto: none of its 2 checkpoints is complete"):
        checkpoints_to_resume(started, tmp_path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as Hydra leaves it, with a checkpoint."""
    record = tmp_path / "run" / ".hydra"
    record.mkdir(parents=True)
    typed = ["model=llama2_debug", "parallel=tp", "mesh.tp=2", "train.steps=9", "resume=never"]
    (record / "overrides.yaml").write_text(yaml.safe_dump(typed))
    own = {"config_name": "train", "name": "train"}
    sources = [{"provider": "main", "path": "/conf"}, {"provider": "command-line", "path": "/mine"}]
    typed_for_hydra = {"hydra": ["hydra.searchpath=[file:///own]", "hydra.run.dir=elsewhere"]}
    hydra = {
        "job": own,
        "runtime": {"cwd": "/there", "config_sources": sources},
        "overrides": typed_for_hydra,
    }
    (record / "hydra.yaml").write_text(yaml.safe_dump({"hydra": hydra}))
    save(tmp_path / "run", 3)
    return tmp_path / "run"


def parsed(*overrides: str, multirun: bool = False) -> Namespace:
    """A command line as Hydra has parsed it."""
    return Namespace(
        multirun=multirun, overrides=list(overrides), config_name=None, config_path=None, config_dir=None
    )


@pytest.mark.parametrize("named", ["run", "run/checkpoints/step-00000003", "'run'"])
@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ([], ["model=llama2_debug", "parallel=tp", "mesh.tp=2", "train.steps=9"]),
        (["train.steps=20"], ["model=llama2_debug", "parallel=tp", "mesh.tp=2"]),
        (["parallel=fsdp"], ["model=llama2_debug", "train.steps=9"]),
        (["mesh.tp=4"], ["model=llama2_debug", "parallel=tp", "train.steps=9"]),
    ],
)
def test_what_was_typed_then_is_typed_again_and_what_is_typed_now_wins(
    run: Path, monkeypatch: pytest.MonkeyPatch, named: str, typed: list[str], kept: list[str]
) -> None:
    monkeypatch.chdir(run.parent)
    arguments = parsed(f"resume={named}", *typed)
    assert repeat_command_of_run(arguments) == run
    now = [f"resume={named}", *typed, f"hydra.run.dir={run}"]
    assert arguments.overrides == ["hydra.searchpath=[file:///own]", *kept, *now]
    assert (arguments.config_name, arguments.config_path, arguments.config_dir) == ("train", None, "/mine")


@pytest.mark.parametrize(
    ("package", "own"), [(".", None), ("tpresearch", None), ("other", True), (None, None)]
)
def test_a_conf_of_ones_own_is_that_of_the_next_start_too(
    run: Path, package: str | None, own: bool | None
) -> None:
    record, conf = run / ".hydra" / "hydra.yaml", run.parent / "code" / "conf"
    record.write_text(record.read_text().replace("/conf", str(conf)))
    if package:  # or it is gone
        conf.mkdir(parents=True)
        (conf.parent / package / "launch").mkdir(parents=True)
    arguments = parsed(f"resume={run}")
    repeat_command_of_run(arguments)
    assert arguments.config_path == (str(conf) if own else None)


@pytest.mark.parametrize("trains", [False, True])
def test_a_start_that_is_refused_is_not_repeated_unless_it_has_saved_a_checkpoint(
    run: Path, trains: bool
) -> None:
    record = run / ".hydra" / "overrides.yaml"
    before = record.read_text()

    @keeping_overrides(run)
    def start() -> None:
        record.write_text("[train.steps=99]")
        if trains:
            save(run, 7)
        raise ConfigError("train.micro_batch_size", 8, "a device is out of memory", "fewer rows at a time")

    with pytest.raises(ConfigError):
        start()
    assert record.read_text() == ("[train.steps=99]" if trains else before)


def test_config_files_of_ones_own_are_found_from_another_folder(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = run / ".hydra" / "hydra.yaml"
    record.write_text(record.read_text().replace("[file:///own]", "[file://own,file:///a,pkg://b]"))
    (run.parent / "own").mkdir()
    monkeypatch.chdir(run.parent)
    assert overrides_of_run(run)[0] == "hydra.searchpath=[file://own,file:///a,pkg://b]"
    monkeypatch.chdir(run)
    assert overrides_of_run(run)[0] == "hydra.searchpath=['file:///there/own','file:///a','pkg://b']"


def test_files_are_those_that_its_folder_has(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = run.parent / "o,ther"
    (there / "texts").mkdir(parents=True)
    (there / "texts" / "a.txt").touch()
    record = run / ".hydra" / "hydra.yaml"
    record.write_text(record.read_text().replace("cwd: /there", f"cwd: {there}"))
    words = [
        "data.path=texts/*.txt",
        "tokenizer.path=owner/name",
        "init_from=null",
        "data.cache_dir='~/texts'",
    ]
    words += ["data.text_field=texts"]
    (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(words))
    monkeypatch.chdir(run.parent)
    assert overrides_of_run(run)[1:] == [f"data.path='{there}/texts/*.txt'", *words[1:]]
    words[0] = "data.path=[texts/a.txt,b.txt]"
    (run / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(words))
    assert overrides_of_run(run)[1] == f"data.path=['{there}/texts/a.txt',b.txt]"
    monkeypatch.chdir(there)
    assert overrides_of_run(run)[1:] == words


@pytest.mark.parametrize("name", ["it's [1] of a=b, #2: \\x", "2026"])
def test_a_run_resumes_whatever_its_folder_is_called(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(run.parent)
    named = run.rename(run.with_name(name))
    words = [override("resume", name), override("hydra.run.dir", named)]
    flags = {"config_name": "other", "config_path": "/own", "config_dir": "/here"}
    arguments = Namespace(multirun=False, overrides=words, **flags)
    assert repeat_command_of_run(arguments) == named
    pruned = parsed(override("resume", f"{name}/checkpoints/step-00000002"))
    assert repeat_command_of_run(pruned) == named, "since a job began there that torchrun has restarted"
    assert flags.items() <= vars(arguments).items()


def test_a_run_resumes_in_its_own_folder(run: Path) -> None:
    for overrides in (["train.steps=3"], ["resume=auto", "hydra.run.dir=x"], ["resume=never"]):
        arguments = parsed(*overrides)
        assert repeat_command_of_run(arguments) is None
        assert arguments.overrides == overrides
    with pytest.raises(ConfigError, match=r"hydra\.run\.dir=x: resume=.* continues in that run's own folder"):
        repeat_command_of_run(parsed(f"resume={run}", "hydra.run.dir=x"))
    with pytest.raises(
        ConfigError, match=r"^resume='run: there is no such folder; "
    ):  # a quote that is not closed
        repeat_command_of_run(parsed("resume='run"))
    with pytest.raises(ConfigError, match=r"^resume=null: there is no such folder; "):
        repeat_command_of_run(parsed("resume="))
    for sweep in (parsed(f"resume={run}", multirun=True), parsed(f"resume={run}", "hydra.mode=MULTIRUN")):
        with pytest.raises(ConfigError, match="the jobs of a sweep have folders of their own"):
            repeat_command_of_run(sweep)
    for record in (run / ".hydra").iterdir():
        content = record.read_text()
        record.write_text("")  # as after a crash of the host
        with pytest.raises(
            ConfigError, match=rf"^resume={run}: its overrides cannot be read: .*; a run folder "
        ):
            repeat_command_of_run(parsed(f"resume={run}"))
        record.unlink()
        with pytest.raises(ConfigError, match="its overrides cannot be read: No such file"):
            repeat_command_of_run(parsed(f"resume={run}"))
        record.write_text(content)


def test_a_run_that_cannot_be_resumed_is_started_over_as_it_was(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = {"model": "llama2_debug", "parallel": "tp", "mesh.tp": "2", "hydra.searchpath": "[file:///own]"}
    again |= {"resume": "never", "hydra.run.dir": run}
    typed = [f"resume={run}", "train.steps=20"]
    monkeypatch.setattr("sys.argv", ["train.py", *typed])
    with pytest.raises(ConfigError) as refused, repeating_overrides(run):
        check_corpus(ABOUT, "d", "t", 64)
    assert refused.value.fix == again
    with pytest.raises(ConfigError) as refused, repeating_overrides(None):
        check_corpus(ABOUT, "d", "t", 64)
    assert refused.value.fix == {"resume": "never"}, "no run is named whose overrides could be repeated"
    (folder_of(run, 3) / ".metadata").unlink()
    with pytest.raises(ConfigError, match="none of its 1 checkpoints is complete") as refused:
        repeat_or_start_again(parsed(*typed))
    assert refused.value.fix == again
