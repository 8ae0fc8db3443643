"""Sweeps: what each job needs, what is judged before any starts, what runs beside what, and what is left out."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from filelock import FileLock
from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from support import composed
from support.made_checkpoints import save
from support.processes import wait_for
from support.sweeps import Pretended, Sweep

from tpresearch.config import ConfigError
from tpresearch.config.compose import as_dict
from tpresearch.config.schema import DataConfig, DataSource, TokenizerConfig
from tpresearch.data.tokenizer import train_bpe
from tpresearch.launch.command import Command, WrongCommand
from tpresearch.launch.composition import initialize_conf
from tpresearch.sweep import launcher, slurm
from tpresearch.sweep.job import CONSOLE_LOG, CompletedRun, Job, contents_of, signature, will_resume
from tpresearch.sweep.running import (
    JOB_VARIABLE,
    Devices,
    DeviceShare,
    StartJob,
    collect_signals,
    job_environment,
    job_value,
    local_command,
    processes_of,
    run_jobs,
    set_aside,
)
from tpresearch.sweep.slurm import NodeAgent, SlurmJob


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setattr(sys, "argv", ["train.py", "-m"])
    monkeypatch.setattr(launcher, "_visible_gpus", list)
    monkeypatch.setattr("tpresearch.sweep.running.POLL_S", 0.001)
    return Sweep(tmp_path / "sweep")


def table(sweep: Sweep) -> list[dict[str, str]]:
    with (sweep.folder / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_jobs_are_started_with_their_own_world_size_and_folder(sweep: Sweep) -> None:
    sweep("parallel=none,tp,fsdp_tp", "mesh.tp=null", "logger=none")
    assert [job.ranks for job in sweep.started] == [1, 4, 4]
    one, four, _ = (local_command(job) for job in sweep.started)
    assert "torch.distributed.run" not in one
    assert four[1:5] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"]
    assert {"parallel=tp", f"hydra.run.dir={sweep.folder}/1", "hydra.mode=RUN"} <= set(four)
    assert not any("hydra.sweep" in word or "logger.group" in word for word in four)


def test_all_jobs_of_a_sweep_are_one_group_and_one_folder_in_wandb(sweep: Sweep) -> None:
    sweep("parallel=none,tp", "logger=wandb", "hydra.searchpath=[]")
    for job in sweep.started:
        assert f"logger.dir={sweep.folder}" in job.arguments
        assert any(word.startswith("logger.group=") for word in job.arguments)
        assert "hydra.searchpath=[]" in job.arguments
    assert not any("logger.tags" in word for job in sweep.started for word in job.arguments)
    sweep("parallel=none,tp", "optimizer.lr=1e-3,2e-3", "train.steps=7", "logger=wandb", "logger.tags=[mine]")
    last = [[word for word in job.arguments if word.startswith("logger.tags=")][-1] for job in sweep.started]
    assert last == [f"logger.tags=[mine,'optimizer.lr={lr}']" for lr in ("0.001", "0.002")] * 2
    sweep("parallel=none,ddp", "logger=wandb", "logger.group=mine")
    assert all("logger.group=mine" in job.arguments for job in sweep.started)


def test_a_long_folder_is_no_group_that_wandb_refuses(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep.folder = sweep.folder / ("x" * 200)
    sweep.folder.mkdir(parents=True)
    monkeypatch.setenv("WANDB_RUN_ID", "theirs")
    sweep("parallel=none", "logger=wandb")
    (group,) = [word for word in sweep.started[0].arguments if word.startswith("logger.group=")]
    assert len(group.removeprefix("logger.group=")) == 128
    assert "WANDB_RUN_ID" not in job_environment(sweep.folder)
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    sweep("parallel=none", "logger=wandb")
    assert not any(word.startswith("logger.group=") for job in sweep.started for word in job.arguments)


@pytest.mark.parametrize("folder", [".", "outputs"])
def test_a_sweep_in_this_folder_is_a_group_of_its_name(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    sweep.folder = Path(folder)
    sweep("parallel=none", "logger=wandb")
    assert f"logger.group={'mine' if folder == '.' else folder}" in sweep.started[0].arguments


def test_no_job_starts_while_any_is_wrong(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", "-m", "parallel=tp", "mesh.tp=2,3"])
    with pytest.raises(ConfigError) as refused:
        sweep("parallel=tp", "mesh.tp=2,3")
    said = str(refused.value)
    assert said.startswith("mesh.tp=3: does not divide ")
    assert ", in job 1 of the sweep (" in said
    assert isinstance(refused.value, WrongCommand)
    assert isinstance(refused.value.command, Command)
    assert refused.value.command.arguments == ("-m", "parallel=tp", "mesh.tp=2")
    assert sweep.started == []


def test_a_failed_job_leaves_the_others_alone(sweep: Sweep) -> None:
    sweep.code = lambda job: int(job.number == 0)
    told = sweep("parallel=none,tp,fsdp")
    assert isinstance(told[0], launcher.JobFailed)
    assert told[1:] == [6.0, 7.0]  # the objective: train/loss
    assert [row["status"] for row in table(sweep)] == ["failed", "completed", "completed"]
    assert table(sweep)[0]["error"] == "ValueError: no"
    assert "ValueError: no" in (sweep.folder / "summary.md").read_text()


def test_fail_fast_stops_at_the_first_failure(sweep: Sweep) -> None:
    sweep.code = lambda job: int(job.number == 1)
    sweep("parallel=none,tp,fsdp,ddp", fail_fast=True)
    assert sweep.numbers == [0, 1]
    assert [row["status"] for row in table(sweep)] == ["completed", "failed", "not started", "not started"]


def test_the_objective_is_any_figure_of_the_summary(sweep: Sweep) -> None:
    sweep.figures = lambda job: {"val/loss": 3.5 - job.number}
    assert sweep("parallel=none,tp", objective="val/loss") == [3.5, 2.5]


def test_started_again_it_runs_what_is_not_completed(sweep: Sweep) -> None:
    sweep.code = lambda job: int(job.number == 1)
    sweep("parallel=none,tp,fsdp")
    sweep.code = lambda job: 0
    with pytest.raises(ConfigError):
        sweep("parallel=none,tp,fsdp", "train.global_batch_size=9")
    told = sweep("parallel=none,tp,fsdp")
    assert sweep.numbers == [1]
    assert told == [5.0, 6.0, 7.0]
    assert [row["status"] for row in table(sweep)] == ["completed"] * 3


def test_other_text_in_the_same_files_is_another_job(sweep: Sweep, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("one")
    sweep.figures = contents_of
    words = ("parallel=none", "data=text", f"data.path={text}")
    sweep(*words)
    for content, again in (("one", []), ("two", ["0-2"]), ("two", []), ("one", [])):
        text.write_text(content)
        sweep(*words)
        assert [job.folder.name for job in sweep.started] == again
        if again:
            note = sweep.started[0].notes[-1]
            assert note == f"its text has changed since {sweep.folder / '0'} was completed"


def test_another_tokenizer_in_the_same_file_is_another_job(sweep: Sweep, tmp_path: Path) -> None:
    sweep.figures = contents_of
    (text := tmp_path / "mine.txt").write_text("some words")
    words = ("parallel=none", "data=text", f"data.path={text}", "tokenizer=hf", "tokenizer.vocab_size=260")
    for learned, notes in (("some words", []), ("a text", ["its tokenizer has changed"]), ("a text", [])):
        train_bpe([learned * 9], 260).save(file := tmp_path / "tokenizer.json")
        sweep(*words, f"tokenizer.path={file}")
        assert [job.notes[-1].partition(" since ")[0] for job in sweep.started if job.notes] == notes


def test_other_initial_weights_in_the_same_folder_are_another_job(tmp_path: Path) -> None:
    parts = {"data": OmegaConf.structured(DataConfig(DataSource.random_tokens)), "init_from": str(tmp_path)}
    config = OmegaConf.create(parts | {"tokenizer": OmegaConf.structured(TokenizerConfig())})
    job = Job(0, [], tmp_path, 1, 1, False, "", "", [], config)
    save(tmp_path, 1)
    run = CompletedRun(tmp_path, {**contents_of(job), "corpus_hash": "random_tokens"})
    assert run.changed(contents_of(job)) == []
    save(tmp_path, 2)
    assert run.changed(contents_of(job)) == ["init_from"]


def test_the_text_of_a_job_is_that_of_its_local_folder_too(tmp_path: Path) -> None:
    def text(path: Path | str) -> str | None:
        data = OmegaConf.structured(DataConfig(DataSource.hf, str(path)))
        parts = {"data": data, "tokenizer": OmegaConf.structured(TokenizerConfig()), "init_from": None}
        job = Job(0, [], tmp_path, 1, 1, False, "", "", [], OmegaConf.create(parts))
        return contents_of(job).get("corpus_hash")

    (tmp_path / "a.jsonl").write_text('{"text": "one"}')
    before = text(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"text": "two"}')
    assert None not in (before, text(tmp_path))
    assert text(tmp_path) != before
    assert text("owner/stories") is None


def test_a_job_in_a_folder_that_was_moved_is_the_same(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files too are named by their absolute paths."""
    sweep.figures = contents_of
    record = sweep.folder / "0" / ".hydra" / "hydra.yaml"

    def started_in(project: Path) -> list[int]:
        monkeypatch.chdir(project)
        sweep("parallel=none", "data=text", f"data.path={project}/mine.txt", f"data.cache_dir={tmp_path}")
        return sweep.numbers

    (then := tmp_path / "then").mkdir()
    (then / "mine.txt").write_text("text")
    assert started_in(then) == [0]
    record.parent.mkdir()
    record.write_text(f"hydra: {{runtime: {{cwd: {then}}}}}")
    (now := tmp_path / "now").mkdir()
    (now / "mine.txt").write_text("text")
    assert started_in(now) == [0]  # another project, while that is there
    shutil.rmtree(sweep.folder / "0-2")
    shutil.rmtree(then)
    assert started_in(now) == []


def test_a_job_that_repeats_another_is_named(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    sweep("parallel=none", "train.steps=30,30,40")
    said = capsys.readouterr().out
    assert said.startswith("job 1 repeats job 0: their configs are the same\n")
    assert said.count(" repeats job ") == 1


def test_rules_of_a_plan_that_a_job_does_not_have_are_noted_at_its_start(sweep: Sweep) -> None:
    sweep("parallel=tp,fsdp", "model.plans.tp.output.dst=replicate", "world_size=2")
    note = "model.plans.tp.output.dst=replicate has no effect: parallel=fsdp has no rules"
    assert [job.notes for job in sweep.started] == [(), (note,)]


def test_a_simulation_that_is_completed_is_not_repeated(sweep: Sweep) -> None:
    """Its job is one process, and its summary has the ranks that it simulated."""
    sweep.figures = lambda job: {"predicted": True, "world_size": 64}
    sweep("parallel=none")
    sweep("parallel=none")
    assert sweep.numbers == []


def test_another_config_is_another_job_and_leaves_the_completed_ones(sweep: Sweep) -> None:
    sweep("parallel=none,tp", "train.steps=2")
    sweep("parallel=fsdp,tp,none", "train.steps=2", "logger=none", "data.cache_dir=elsewhere")
    assert sweep.numbers == [0]  # tp and none are found in the folders of another order
    assert sweep.started[0].folder == sweep.folder / "0-2"
    sweep("parallel=none,tp", "train.steps=3")
    assert sweep.numbers == [0, 1]
    assert len(list(sweep.folder.glob("*/summary.json"))) == 5


def test_a_folder_of_a_single_run_is_refused_for_a_sweep(sweep: Sweep) -> None:
    with pytest.raises(ConfigError, match=r"^hydra.run.dir=mine: it is for a single run, ") as refused:
        sweep("parallel=none,tp", "hydra.run.dir=mine")
    assert refused.value.fix == {"hydra.run.dir": None, "hydra.sweep.dir": "mine"}
    assert sweep.started == []


@pytest.mark.parametrize(
    ("subdir", "folders"),
    [("job-${hydra.job.num}", ["job-0", "job-1"]), ("${parallel.name}", ["none", "tp"])],
)
def test_a_jobs_folder_is_called_as_hydra_would_call_it(
    sweep: Sweep, subdir: str, folders: list[str]
) -> None:
    sweep("parallel=none,tp", f"hydra.sweep.subdir={subdir}")
    assert [job.folder.name for job in sweep.started] == folders


@pytest.mark.parametrize("subdir", ["../precious", "/tmp", ".", "x/..", "link"])
def test_a_job_has_its_folder_below_the_sweeps(sweep: Sweep, subdir: str) -> None:
    precious = sweep.folder.parent / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    sweep.folder.mkdir()
    (sweep.folder / "link").symlink_to(precious)
    with pytest.raises(ConfigError, match=f"hydra.sweep.subdir={subdir}: not below the sweep's own folder"):
        sweep("parallel=none", f"hydra.sweep.subdir={subdir}")
    assert [path.name for path in precious.iterdir()] == ["thesis.tex"]


def test_a_folder_that_is_no_jobs_is_left_to_its_owner(sweep: Sweep) -> None:
    (sweep.folder / "0").mkdir(parents=True)
    (sweep.folder / "0" / "mine").touch()
    (sweep.folder / "1").touch()
    (sweep.folder / "2").symlink_to("nowhere")
    (sweep.folder / "3").mkdir()
    sweep("parallel=none,tp,fsdp,ddp")
    assert [job.folder.name for job in sweep.started] == ["0-2", "1-2", "2-2", "3"]
    assert (sweep.folder / "0" / "mine").exists()


def test_what_an_earlier_start_left_is_kept_beside_the_new_one(sweep: Sweep) -> None:
    sweep("parallel=none")
    job = sweep.started[0]
    set_aside(job)
    job.folder.mkdir()
    (job.folder / CONSOLE_LOG).touch()
    set_aside(job)
    set_aside(job)
    assert {path.name for path in sweep.folder.glob("0*")} == {"0.earlier-1", "0.earlier-2"}


def test_a_job_with_a_checkpoint_resumes_where_it_is(
    sweep: Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    def left() -> set[str]:
        return {path.name for path in sweep.folder.glob("0*")}

    sweep.code = lambda job: 1
    sweep("parallel=none")
    job = sweep.started[0]
    (job.folder / CONSOLE_LOG).write_text("said then")
    (job.folder / "checkpoints" / "step-00000002").mkdir(parents=True)
    sweep("parallel=none")
    assert "resumes" not in capsys.readouterr().out  # no checkpoint is complete there
    (job.folder / "checkpoints" / "step-00000002" / "checkpoint.json").touch()
    sweep("parallel=none", "checkpoint.every=1")  # which says nothing of what is computed
    assert "job 0 resumes on 1 rank: " in capsys.readouterr().out
    set_aside(job)
    (job.folder / CONSOLE_LOG).write_text("said later")
    set_aside(job)
    assert left() == {"0"}
    logs = [(job.folder / f"{CONSOLE_LOG}.earlier-{nth}").read_text() for nth in (1, 2)]
    assert logs == ["said then", "said later"]
    assert not (job.folder / "summary.json").exists()
    sweep("parallel=none", "train.steps=7")
    assert "job 0 starts on 1 rank: " in capsys.readouterr().out
    set_aside(sweep.started[0])
    set_aside(job)
    assert left() == {"0.earlier-1"}


def test_a_job_resumes_in_its_folder_under_another_number_too(sweep: Sweep) -> None:
    sweep.folder = sweep.folder.with_name("sweep.earlier-1")  # whose own name tells nothing of its jobs
    sweep.code = lambda job: 1
    sweep("parallel=none,tp")
    for job in sweep.started:
        save(job.folder, 2, job.ranks)
    sweep("parallel=fsdp,none,tp,none")
    assert [job.folder.name for job in sweep.started] == ["0-2", "0", "1", "3"]
    assert [will_resume(job) for job in sweep.started] == [False, True, True, False]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are found by /proc")
def test_a_job_of_a_killed_start_is_waited_for_and_named(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    env = {**os.environ, JOB_VARIABLE: job_value(sweep.folder / "0")}
    said: list[str] = []
    monkeypatch.setattr(launcher.TorchrunLauncher, "_print", lambda self, line: said.append(line))
    with subprocess.Popen([sys.executable, "-c", "input()"], env=env, stdin=subprocess.PIPE) as left:
        wait_for(lambda: processes_of(sweep.folder / "0") == [left.pid])
        monkeypatch.setattr("tpresearch.sweep.running.GRACE_S", 0)
        runs = f"a job of an earlier launch is still running in {sweep.folder}/0, as process {left.pid}"
        with pytest.raises(ConfigError, match=f"hydra.sweep.dir={sweep.folder}: {runs}; wait for its end, "):
            sweep("parallel=none,tp")
        assert sweep.started == []
        monkeypatch.setattr("tpresearch.sweep.running.GRACE_S", 600)
        monkeypatch.setattr("tpresearch.sweep.running.time.sleep", lambda _: left.kill())
        sweep("parallel=none")
    assert said[:2] == [f"{runs}: waiting for its end"] * 2
    assert sweep.numbers == [0]


def test_a_folder_that_a_run_uses_is_left_to_it(sweep: Sweep) -> None:
    sweep("parallel=none")
    used = sweep.started[0].folder
    (used / "summary.json").unlink()
    (used / CONSOLE_LOG).touch()
    in_use = f"{used}: another run is using this folder"
    with FileLock(used / ".lock"), pytest.raises(ConfigError, match=in_use):
        sweep("parallel=none")
    assert sweep.started == []
    assert sweep("parallel=none") == [5.0]


def test_a_table_that_cannot_be_written_is_printed(sweep: Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    (sweep.folder / "summary.csv").mkdir(parents=True)
    assert sweep("parallel=none") == [5.0]
    said = capsys.readouterr().out
    assert "summary.csv and summary.md could not be written: [Errno 21] Is a directory" in said
    assert "completed" in said


def test_what_is_no_record_of_a_run_is_passed_over(sweep: Sweep) -> None:
    sweep("parallel=none")
    for number, text in enumerate(["[" * 20_000, '{"status": "completed"}', "3"]):
        (sweep.folder / f"x{number}").mkdir()
        (sweep.folder / f"x{number}" / "summary.json").write_text(text)
        (sweep.folder / f"x{number}" / "config.yaml").write_text("a: &a [*a]")
    (sweep.folder / "0" / "config.yaml").write_text("a: &a [*a]")
    sweep("parallel=none")
    assert sweep.numbers == [0]


def test_slurms_nodes_are_asked_for_whatever_gpus_are_here(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "_visible_gpus", lambda: ["0"])
    monkeypatch.setattr(launcher.TorchrunLauncher, "ranks_per_node", 8)
    sweep("parallel=none,fsdp", "device=cuda", "world_size=16", "train.global_batch_size=16", cpu_slots=17)
    assert [(job.slots, job.gpus, job.nodes) for job in sweep.started] == [(1, False, 1), (16, False, 2)]


def test_slurms_jobs_meet_at_ports_of_their_own_that_linux_gives_to_no_connection() -> None:
    """By default, net.ipv4.ip_local_port_range begins at 32768. Jobs may share a node."""

    def port(task: int) -> int:
        node: Any = SimpleNamespace(num_nodes=2, job_id=f"41_{task}", hostnames=["a", "b"])
        (endpoint,) = [
            word for word in NodeAgent([], 1, Path())._agent(node) if word.startswith("--rdzv-endpoint=a:")
        ]
        return int(endpoint.rpartition(":")[2])

    ports = [port(task) for task in range(32)]
    assert len(set(ports)) == 32
    assert 1024 <= min(ports) <= max(ports) < 32768
    assert port(7) == ports[7], "as the job's other node has it"


@pytest.mark.parametrize(("codes", "code"), [([0, 0], 0), ([0, 3], 3)])
def test_slurms_job_has_failed_where_any_of_its_nodes_has(codes: list[int], code: int) -> None:
    handle: Any = SimpleNamespace(done=lambda: True, results=lambda: codes)
    nothing: Any = None
    assert SlurmJob(nothing, handle).poll() == code


@pytest.mark.parametrize(("typed", "threads"), [({}, "3"), ({"OMP_NUM_THREADS": "7"}, "7")])
def test_slurms_ranks_share_their_nodes_cores_unless_threads_are_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, typed: dict[str, str], threads: str
) -> None:
    node = SimpleNamespace(
        node=0, num_nodes=1, cluster="slurm", paths=SimpleNamespace(result_pickle=tmp_path / "none")
    )
    start = Mock(return_value=Mock(wait=lambda: 0))
    monkeypatch.setattr("submitit.JobEnvironment", lambda: node)
    monkeypatch.setattr(slurm, "start_process", start)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in typed.items():
        monkeypatch.setenv(name, value)
    assert NodeAgent([], 2, tmp_path, 3)() == 0
    assert start.call_args.args[1]["OMP_NUM_THREADS"] == threads


def test_ranks_that_do_not_fill_nodes_alike_are_refused(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher.TorchrunLauncher, "ranks_per_node", 4)
    with pytest.raises(ConfigError) as refused:
        sweep("parallel=fsdp", "world_size=5", "train.global_batch_size=10")
    assert str(refused.value).startswith("hydra.launcher.ranks_per_node=4: 5 ranks cannot be divided evenly")


def test_no_two_sweeps_run_in_one_folder(sweep: Sweep) -> None:
    sweep.folder.mkdir()
    with FileLock(sweep.folder / ".lock"), pytest.raises(ConfigError) as refused:
        sweep("parallel=none")
    assert str(refused.value).startswith(f"hydra.sweep.dir={sweep.folder}: another sweep is using this")
    assert sweep.started == []
    assert sweep("parallel=none") == [5.0]


def test_an_objective_that_no_job_has_is_a_failure_for_the_sweeper(sweep: Sweep) -> None:
    (told,) = sweep("parallel=none", objective="val/los")
    assert isinstance(told, launcher.JobFailed)
    assert "no number for hydra.launcher.objective=val/los" in str(told)


def test_under_nohup_a_sweep_outlives_its_terminal() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with collect_signals() as received:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signature_is_of_what_is_computed() -> None:
    one = as_dict(composed.config("parallel=tp"))
    words = "name=x", "logger=wandb", "world_size=2", "checkpoint.every=3", "resume=never"
    files = "data.cache_dir=/y", "data.max_record_bytes=99999"
    same = as_dict(composed.config("parallel=tp", *words, *files))
    same |= {"verify": {"steps": 9}, "gpus": 8, "trace": "steps.json"}
    other = as_dict(composed.config("parallel=tp", "train.seed=1"))
    assert signature(one, 2) == signature(same, 2) != signature(one, 4)
    assert signature(one, 2) != signature(other, 2)
    assert signature(one, 2, without_seed=True) == signature(other, 2, without_seed=True)


def test_the_gpus_of_a_sweep_are_those_that_are_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert launcher._visible_gpus() == ["4", "5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert launcher._visible_gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setitem(sys.modules, "torch", None)  # to import it would raise
    assert launcher._visible_gpus() == []


def test_jobs_run_side_by_side_on_gpus_of_their_own(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_visible_gpus", lambda: ["4", "5", "6", "7"])
    sweep("parallel=tp,fsdp,none", "world_size=2")
    shown = [share.environment()["CUDA_VISIBLE_DEVICES"] for share in sweep.shares]
    assert shown[:2] == ["4,5", "6,7"]
    assert shown[2] in ("4", "6")
    assert sweep.most_at_once == 2


@pytest.mark.parametrize(("slots", "at_once"), [(None, 1), (2, 1), (4, 2), (6, 3)])
def test_on_cpus_as_many_run_as_have_slots(sweep: Sweep, slots: int | None, at_once: int) -> None:
    sweep("parallel=tp,fsdp,ddp", "world_size=2", cpu_slots=slots)
    assert (len(sweep.started), sweep.most_at_once) == (3, at_once)
    assert all("CUDA_VISIBLE_DEVICES" not in share.environment() for share in sweep.shares)


def test_simulated_steps_run_one_per_core_on_no_gpu(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "_visible_gpus", lambda: ["0"])
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    sweep("parallel=tp,fsdp,ddp,none", "world_size=2", "+cluster=h100_dgx")
    assert sweep.most_at_once == 3
    assert not any("CUDA_VISIBLE_DEVICES" in share.environment() for share in sweep.shares)
    sweep("parallel=tp,fsdp,ddp,none", "world_size=4", "+cluster=h100_dgx", cpu_slots=2)
    assert sweep.most_at_once == 2
    sweep("parallel=tp,fsdp,ddp,none", "world_size=8", "+cluster=h100_dgx", "gpus=8")
    assert sweep.most_at_once == 1  # a planner takes all cores


def test_a_file_chooses_the_launcher_unless_it_is_swept_itself(sweep: Sweep, tmp_path: Path) -> None:
    """Hydra starts a sweep's launcher before it composes the jobs: theirs would be ignored."""
    file = tmp_path / "mine" / "experiment" / "far.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("# @package _global_\ndefaults: [{override /hydra/launcher: slurm}]\n")
    mine = f"hydra.searchpath=[file://{tmp_path}/mine]"
    with pytest.raises(WrongCommand) as refused:
        sweep("experiment=far,seed_tp", mine)
    said = "hydra/launcher=slurm: chosen by a file that is swept, when torchrun "
    assert str(refused.value).startswith(said)
    assert "hydra/launcher=slurm" in str(refused.value.command)
    GlobalHydra.instance().clear()
    with initialize_conf():
        found = compose("train", ["experiment=far", mine], return_hydra_config=True)
    assert found.hydra.runtime.choices["hydra/launcher"] == "slurm"


def test_experiments_are_swept_by_a_glob(sweep: Sweep) -> None:
    sweep("experiment=glob(seed_*)", "data=random_tokens", "train.loss=next_token")
    assert [job.settings["experiment"] for job in sweep.started] == ["seed_2d", "seed_sp", "seed_tp"]


def test_a_glob_that_matches_nothing_is_refused(sweep: Sweep) -> None:
    with pytest.raises(ConfigError, match="matches no option"):
        sweep("experiment=glob(zzz*)")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_is_interrupted_is_stopped_and_said(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    stopped: list[Pretended] = []

    def interrupted(jobs: Sequence[Job], devices: Devices, start: StartJob, *rest: Any) -> None:
        def starts(job: Job, share: DeviceShare) -> Pretended:
            started = start(job, share)
            assert isinstance(started, Pretended)
            stopped.append(started)
            started.looks = 1000
            os.kill(os.getpid(), number)
            return started

        run_jobs(jobs, devices, starts, *rest)

    monkeypatch.setattr(launcher, "run_jobs", interrupted)
    sweep.code = lambda job: 1
    with pytest.raises(SystemExit) as ended:
        sweep("parallel=none,tp")
    assert ended.value.code == code
    assert [job.asked_to_end for job in stopped] == [True]
    assert [row["status"] for row in table(sweep)] == ["preempted", "not started"]
