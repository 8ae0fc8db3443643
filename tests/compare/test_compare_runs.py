"""Which runs are found, what they are called, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.made_runs import Made

from tpresearch import checkpoints
from tpresearch.compare.__main__ import Options, Overlay, Seeds, main
from tpresearch.compare.groups import (
    check_comparable,
    comparisons_of,
    group_each_run,
    group_over_seeds,
    has_repeats,
    labels,
    last_of_each_seed,
)
from tpresearch.compare.runs import find_runs
from tpresearch.config.choices import Loss, TokenizerKind
from tpresearch.config.errors import ConfigError
from tpresearch.launch.claim import EARLIER_SUFFIX
from tpresearch.launch.command import WrongCommand
from tpresearch.launch.options import words_and_options

ROOT = Path(__file__).parents[2]


def named(*words: str) -> list[str]:
    runs = find_runs(list(words)).runs
    return labels(runs)


def test_a_record_of_an_earlier_version_has_the_defaults_of_what_it_lacks(tmp_path: Path) -> None:
    new, old = Made("none").write(tmp_path / "new"), Made("tp", {"tp": 2}).write(tmp_path / "old")
    config = yaml.safe_load((old / "config.yaml").read_text())
    del config["init_from"], config["defects"], config["optimizer"]["decay_vectors"]
    (old / "config.yaml").write_text(yaml.safe_dump(config))
    runs = find_runs([str(new), str(old)]).runs
    assert [len(comparison.groups) for comparison in comparisons_of(group_each_run(runs))] == [2]
    assert runs[1].config["optimizer"]["decay_vectors"] is False
    runs[1].config["optimizer"]["name"] = ["adamw"]
    assert [len(comparison.groups) for comparison in comparisons_of(group_each_run(runs))] == [1, 1]


def test_the_runs_kept_in_experiments_are_one_science() -> None:
    runs = find_runs([str(ROOT / "experiments/plans/runs")]).runs
    assert [len(comparison.groups) for comparison in comparisons_of(group_each_run(runs))] == [8]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Eleven jobs under their numbers."""
    for number in range(11):
        Made("tp", {"tp": 2}, lr=0.001 * (1 + number), steps=2).write(tmp_path / "sweep" / str(number))
    return tmp_path / "sweep"


def test_runs_sweeps_and_globs(sweep: Path) -> None:
    found = find_runs([str(sweep)])
    assert [run.folder.name for run in found.runs] == [str(number) for number in range(11)]
    assert found.sweep == sweep
    some = find_runs([str(sweep / "3"), str(sweep / "1*"), str(sweep / "3")])
    assert [run.folder.name for run in some.runs] == ["3", "1", "10"]
    assert some.sweep is None
    assert find_runs([str(sweep / "3")]).sweep is None
    assert len(find_runs([str(sweep.parent / "**")]).runs) == 11


def test_numbers_in_names_count_as_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the runs are named: by their folder, by a glob, and by what a shell makes of one."""
    in_order = ["n1", "n2", "n10", "n10.5", "n10.50"]
    for name in in_order:
        Made("tp", {"tp": 2}, lr=1e-4 * float(name[1:]), steps=2).write(tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    for words in (["runs"], ["runs/n*"], [f"runs/{name}" for name in sorted(in_order)]):
        assert [run.folder.name for run in find_runs(words).runs] == in_order
    typed = ["n2", "n10", "n1"]
    assert [run.folder.name for run in find_runs([f"runs/{name}" for name in typed]).runs] == typed


def test_runs_behind_links_are_found_once(sweep: Path) -> None:
    links = sweep.parent / "links"
    links.mkdir()
    ends = {"a": sweep / "3", "b": sweep / "3", "c": links, "d": "nowhere", "e": sweep.parent}
    for name, to in ends.items():
        (links / name).symlink_to(to)
    found = find_runs([str(links)]).runs
    in_order = ("3", "0", "1", "2", *map(str, range(4, 11)))
    assert [run.folder.resolve() for run in found] == [sweep / name for name in in_order]
    assert [run.folder.name for run in find_runs([str(links / "a"), str(links / "b")]).runs] == ["a"]


def test_what_a_sweep_has_set_aside_is_found_by_its_name_alone(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(*words: str | Path) -> list[str]:
        return [run.folder.name for run in find_runs([str(word) for word in words]).runs]

    for nth in (1, 2):  # twice started anew, as a sweep does
        (sweep / "3").rename(sweep / f"3{EARLIER_SUFFIX}{nth}")
        Made("tp", {"tp": 2}, lr=0.004, steps=2).write(sweep / "3")
    assert (sweep / "3.earlier-2" / "summary.json").is_file()
    every = [str(number) for number in range(11)]
    assert found(sweep) == found(sweep.parent) == every
    assert found(sweep / "3*") == ["3"]
    assert sorted(found(sweep.parent / "**")) == sorted(every)
    assert found(sweep / "3.earlier-1", sweep / "3") == ["3.earlier-1", "3"]
    assert found(sweep / "3.earlier-*") == ["3.earlier-1", "3.earlier-2"]
    monkeypatch.chdir(sweep)
    assert found("3*") == ["3"]
    (sweep / "3").rename(sweep / "gone")
    with pytest.raises(ConfigError, match="no run in it"):
        find_runs(["3*"])


def test_names_are_what_tells_runs_apart(tmp_path: Path) -> None:
    Made(steps=2).write(tmp_path / "a")
    Made("tp", {"tp": 2}, steps=2).write(tmp_path / "b")
    assert named(str(tmp_path)) == ["none", "tp"]
    Made("tp", {"tp": 2}, lr=1e-3, steps=2, error=ValueError("x")).write(tmp_path / "c")
    assert named(str(tmp_path)) == ["none · lr=0.003", "tp · lr=0.003", "tp · lr=0.001 (failed)"]
    Made(steps=2).write(tmp_path / "d")
    alike = [f"llama2_debug/single · {end}" for end in ("a", "d")]
    assert named(str(tmp_path / "a"), str(tmp_path / "d")) == alike
    Made("tp", {"tp": 2}, name="mine", steps=2).write(tmp_path / "e")
    Made("tp", {"tp": 4}, name="yours", steps=2).write(tmp_path / "f")
    assert named(str(tmp_path / "e"), str(tmp_path / "f")) == ["mine", "yours"]


def test_the_device_is_the_one_that_was_computed_on(tmp_path: Path) -> None:
    Made(steps=2).write(tmp_path / "a")
    Made("tp", {"tp": 2}, device="NVIDIA H200", steps=2).write(tmp_path / "b")
    first, second = find_runs([str(tmp_path)]).runs
    assert (first.config["device"], second.config["device"]) == ("auto", "auto")
    assert (first.settings["device"], second.settings["device"]) == ("cpu", "NVIDIA H200")
    assert named(str(tmp_path)) == ["none · cpu", "tp · NVIDIA H200"]
    Made(device="NVIDIA H200", seed=1, steps=2).write(tmp_path / "c")
    groups = group_over_seeds(find_runs([str(tmp_path)]).runs)
    assert [len(group.runs) for group in groups] == [1, 1, 1]  # no mean over a CPU and a GPU


def test_dtypes_that_differ_are_shown_even_where_the_plan_tells_runs_apart(tmp_path: Path) -> None:
    Made("none", steps=2).write(tmp_path / "a")
    config = Made("tp", {"tp": 2}, steps=2).write(tmp_path / "b") / "config.yaml"
    told = yaml.safe_load(config.read_text())
    told["train"]["dtype"] = told["optimizer"]["moment_dtype"] = "bfloat16"
    config.write_text(yaml.safe_dump(told))
    assert named(str(tmp_path)) == [
        "none · dtype=float32 · moment_dtype=–",
        "tp · dtype=bfloat16 · moment_dtype=bfloat16",
    ]


def test_a_name_is_one_line_that_a_terminal_does_not_obey(tmp_path: Path) -> None:
    Made(name="a\n b\x1b[31m", steps=2).write(tmp_path / "a")
    Made(name="c", steps=2).write(tmp_path / "b")
    assert named(str(tmp_path)) == ["a b\ufffd[31m", "c"]


BILLION = "a0: &a0 [1]\n" + "".join(f"a{n + 1}: &a{n + 1} [{','.join([f'*a{n}'] * 9)}]\n" for n in range(9))
"""Laughs: nine lists of nine aliases each, in 400 bytes."""


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("summary.json", None, "summary.json is missing (still running, refused, or killed)"),
        ("summary.json", "{", "summary.json cannot be read"),
        ("summary.json", "[1]", "summary.json is not a valid run summary: it is a list"),
        (
            "summary.json",
            '{"status": "completed"}',
            "summary.json is not a valid run summary: world_size is missing",
        ),
        ("config.yaml", None, "config.yaml is missing"),
        ("config.yaml", "a: [", "config.yaml cannot be read"),
        ("config.yaml", "model: llama2_debug", "config.yaml is not a valid run config: model is 'llama2_deb"),
        ("metrics.jsonl", "garbage\n", "metrics.jsonl has no rows, though the run completed"),
        ("metrics.jsonl", '{"train/loss": 3}\n', "it has the row {'train/loss': 3}, whose train/step is no "),
        (
            "metrics.jsonl",
            '{"train/step": 1}\n{"train/step": "2"}\n',
            "metrics.jsonl cannot be read: it has the row {'train/step': '2'}, whose train/step is no number",
        ),
        (
            "metrics.jsonl",
            "[1]\n",
            "metrics.jsonl cannot be read: it has the row [1], whose train/step is no ",
        ),
        (
            "metrics.jsonl",
            '{"train/step": 1, "train/loss": "x"}\n',
            "metrics.jsonl cannot be read: it has the row {'train/loss': 'x', 'train/step': 1}",
        ),
        ("metrics.jsonl", "[" * 20_000, "metrics.jsonl has no rows, though the run completed"),
        (
            "metrics.jsonl",
            '{"train/step": 1, "x": 1%s}' % ("0" * 400),
            "metrics.jsonl cannot be read: it has",
        ),
        ("ledger.json", '{"measured": [{"axis": "tp"}]}', "ledger.json is not a valid run ledger"),
        ("ledger.json", '{"measured": 3}', "ledger.json is not a valid run ledger: measured is 3"),
        (
            "summary.json",
            "[" * 20_000 + "]" * 20_000,
            "summary.json cannot be read: nested more than 50 deep",
        ),
        ("summary.json", "[" * 60 + "]" * 60, "summary.json cannot be read: nested more than 50 deep"),
        (
            "summary.json",
            "[" + "1," * 100_000 + "1]",
            "summary.json cannot be read: more than 100,000 values",
        ),
        ("summary.json", '"' + "x" * 4_200_000 + '"', "summary.json cannot be read: larger than 4.0 MiB"),
        ("config.yaml", BILLION, "config.yaml cannot be read: more than 100,000 values"),
        ("config.yaml", "a: &a [*a]", "config.yaml cannot be read: nested more than 50 deep"),
    ],
)
def test_a_broken_record_is_said_in_one_sentence(
    sweep: Path, file: str, content: str | None, says: str
) -> None:
    broken = sweep / "4"
    if content is None:
        (broken / file).unlink()
    else:
        (broken / file).write_text(content)
    found = find_runs([str(sweep)])
    assert len(found.runs) == 10
    (line,) = found.left_out
    assert says in line
    assert "\n" not in line
    with pytest.raises(ConfigError) as refused:
        find_runs([str(broken), str(sweep)])
    assert says in str(refused.value)
    assert str(refused.value).startswith(f"run={broken}: ")


@pytest.mark.parametrize("figure", ["Infinity", "NaN", "1" + "0" * 400, '{"a": {}}', '"fast"'])
def test_a_figure_is_a_number(sweep: Path, figure: str) -> None:
    path = sweep / "4" / "summary.json"
    path.write_text(path.read_text().replace('"train/loss": 7', f'"train/loss": {figure}, "x": 7'))
    (line,) = find_runs([str(sweep)]).left_out
    assert "summary.json is not a valid run summary: train/loss is " in line


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("comm/bytes_per_step_by_axis", -1),
        ("memory/at_peak_bytes", {"parameters": None}),
        ("corpus_hash", ["c0ffee"]),
    ],
)
def test_what_has_parts_is_told_from_what_is_one(sweep: Path, key: str, value: object) -> None:
    path = sweep / "4" / "summary.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    (line,) = find_runs([str(sweep)]).left_out
    assert f"summary.json is not a valid run summary: {key} is " in line
    assert len(line) < 250


def test_a_record_that_is_no_file_is_not_waited_for(sweep: Path) -> None:
    (sweep / "4" / "summary.json").unlink()
    os.mkfifo(sweep / "4" / "summary.json")
    assert "summary.json cannot be read: not a file" in find_runs([str(sweep)]).left_out[0]


def test_a_job_that_left_no_record_is_named(sweep: Path) -> None:
    (sweep / "11").mkdir()
    (sweep / "11" / "console.log").write_text("error: no\n")
    (sweep / "3" / ".hydra").mkdir()
    (sweep / "3" / ".hydra" / "config.yaml").write_text("{}")
    (sweep / "3" / "wandb" / "run").mkdir(parents=True)
    (sweep / "3" / "wandb" / "run" / "config.yaml").write_text("{}")
    found = find_runs([str(sweep)])
    assert [line.partition(":")[0] for line in found.left_out] == [str(sweep / "11")]


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("nowhere", "run=nowhere: no such folder"),
        ("x*", "run=x*: this glob matches nothing"),
        ("empty", "run=empty: no run in it"),
    ],
)
def test_words_that_name_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError) as refused:
        find_runs([word])
    assert says in str(refused.value)


def test_the_proposed_comparison_leaves_out_the_word_that_is_refused(
    sweep: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [str(sweep / "3"), "nowhere", "seeds=apart"]
    monkeypatch.setattr("sys.argv", ["compare", *words])
    with pytest.raises(WrongCommand) as refused:
        find_runs(words[:-1])
    assert str(refused.value.command).endswith(f" {sweep / '3'} seeds=apart")


def refusal(
    tmp_path: Path, *runs: Made, anyway: bool = False, any_seed: bool = False
) -> ConfigError | list[str]:
    for index, run in enumerate(runs):
        run.write(tmp_path / str(index))
    found = find_runs([str(tmp_path)]).runs
    try:
        return check_comparable(found, anyway=anyway, any_seed=any_seed)
    except ConfigError as error:
        return error


@pytest.mark.parametrize(
    ("other", "field", "fix"),
    [
        (Made(corpus_hash="beef"), "corpus_hash=beef: in corpus_hash=beef, but c0ffee", "overlay"),
        (Made(vocab_size=300), "tokenizer.vocab_size=300: in vocab_size=300, but 4096", "overlay"),
        (Made(unigram_entropy=6.25), "unigram_entropy=6.250: in unigram_entropy=6.250, but 6.500", "overlay"),
        (Made(max_tokens=99), "data.max_tokens=99: in max_tokens=99, but – in max_tokens=–", "overlay"),
        (Made(held_out_every=9), "data.held_out_every=9: in held_out_every=9, but 20", "overlay"),
        (Made(global_batch_size=8), "train.global_batch_size=8: in global_batch_size=8, but 24", "overlay"),
        (Made(settings={"data.seq_len": 64}), "data.seq_len=64: in seq_len=64, but 128", "overlay"),
        (Made(settings={"train.loss": Loss.sum}), "train.loss=sum: in loss=sum, but next_token", "overlay"),
        (
            Made(settings={"tokenizer.kind": TokenizerKind.hf}),
            "tokenizer.kind=hf: in kind=hf, but bpe",
            "overlay",
        ),
        (Made(settings={"tokenizer.path": "x"}), "tokenizer.path=x: in path=x, but – in path=–", "overlay"),
        (Made(seed=7), "train.seed=7: in seed=7, but 0 in seed=0", "seeds"),
    ],
)
def test_runs_that_may_not_be_overlaid(tmp_path: Path, other: Made, field: str, fix: str) -> None:
    error = refusal(tmp_path, Made(), other)
    assert isinstance(error, ConfigError)
    assert str(error).startswith(field)
    assert list(error.fix) == [fix]
    told = refusal(tmp_path, anyway=True)
    assert isinstance(told, list)
    assert len(told) == 1
    assert told[0].startswith(field.partition("=")[0])


def test_what_else_differs_is_said_too_and_seeds_alone_may(tmp_path: Path) -> None:
    error = refusal(tmp_path, Made(), Made(seed=1, corpus_hash="beef"), Made(seed=1, lr=1.0))
    assert "(they also differ in corpus_hash)" in str(error)
    assert isinstance(error, ConfigError)
    assert error.fix == {"overlay": "anyway"}
    still = refusal(tmp_path, any_seed=True)
    assert isinstance(still, ConfigError)
    assert still.field == "corpus_hash"
    assert refusal(tmp_path, Made(seed=0), Made(seed=1), Made("tp", {"tp": 2}, seed=1), any_seed=True) == []


def test_a_predicted_step_has_read_nothing_that_must_match(tmp_path: Path) -> None:
    for index, run in enumerate((Made(max_tokens=99, unigram_entropy=6.25), Made("tp", {"tp": 2}))):
        run.write(tmp_path / str(index))
    runs = find_runs([str(tmp_path)]).runs
    runs[1].summary.update(predicted=True, corpus_hash=None)
    assert check_comparable(runs, anyway=False, any_seed=False) == []
    groups = group_each_run(runs)
    assert [compared.groups for compared in comparisons_of(groups)] == [groups[:1]]
    assert [compared.groups for compared in comparisons_of(groups[1:])] == [groups[1:]]


def test_predictions_of_different_batches_may_be_compared_and_with_a_run_of_one_may_not(
    tmp_path: Path,
) -> None:
    for index, run in enumerate((Made(), Made(), Made(global_batch_size=48))):
        run.write(tmp_path / str(index))
    real, *predicted = find_runs([str(tmp_path)]).runs
    for run in predicted:
        run.summary["predicted"] = True
    assert check_comparable(predicted, anyway=False, any_seed=False) == []
    with pytest.raises(ConfigError, match=r"train.global_batch_size=48: "):
        check_comparable([real, *predicted], anyway=False, any_seed=False)


def test_an_unknown_baseline_and_one_that_several_have(tmp_path: Path) -> None:
    for index, run in enumerate([Made(), Made("fsdp", {"dp_shard": 2}), Made("fsdp", {"dp_shard": 4})]):
        run.write(tmp_path / f"job{index}")
    runs = find_runs([str(tmp_path)]).runs
    groups = group_each_run(runs)
    with pytest.raises(ConfigError, match="baseline=fsd: no run has this name; one of: fsdp · 2 ranks"):
        comparisons_of(groups, "fsd")
    with pytest.raises(ConfigError, match="baseline=fsdp: 2 runs have this name; one of: fsdp · 2 ranks, f"):
        comparisons_of(groups, "fsdp")


def test_options_are_told_from_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=1").mkdir()
    typed = ["a/lr=3", "baseline=tp · lr=1e-3", "lr=1", "lr=*", "seeds=mean"]
    words, options = words_and_options(Options, typed)
    assert words == ["a/lr=3", "lr=1", "lr=*"]
    assert (options.baseline, options.seeds, options.overlay) == ("tp · lr=1e-3", Seeds.mean, Overlay.refuse)
    for text in ("1e-3", "[a", "*x", "${x}", "\\${x}", "a: b: c"):
        assert words_and_options(Options, [f"baseline={text}"])[1].baseline == text
    with pytest.raises(ConfigError, match="basline=tp: unknown option"):
        words_and_options(Options, ["basline=tp"])
    with pytest.raises(ConfigError, match="overlay=maybe"):
        words_and_options(Options, ["overlay=maybe"])
    words, verifying = words_and_options(checkpoints.Options, ["verify_run", "verify=true"])
    assert (words, verifying.verify) == (["verify_run"], True)


def test_a_mean_over_seeds_takes_completed_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Made(steps=2, error=ValueError("boom")).write(tmp_path / "run")
    monkeypatch.setattr(sys, "argv", ["compare", str(tmp_path / "run"), "seeds=mean"])
    with pytest.raises(ConfigError, match="seeds=mean: no run completed; apart, or runs that completed"):
        main()


def test_a_mean_over_seeds_counts_a_repeated_run_once(tmp_path: Path) -> None:
    for index, seed in enumerate((0, 1, 0)):
        Made(seed=seed, steps=2).write(tmp_path / str(index))
    runs, left_out = last_of_each_seed(find_runs([str(tmp_path)]).runs)
    assert sorted(run.folder.name for run in runs) == ["1", "2"]
    repeats = f"{tmp_path / '2'} repeats it, and a mean counts each train.seed once"
    assert left_out == [f"{tmp_path / '0'}: {repeats}"]
    assert last_of_each_seed(runs) == (runs, [])


def test_an_experiment_is_repeated_where_it_was_completed_from_several_seeds(tmp_path: Path) -> None:
    made = [Made(seed=1, lr=1e-2), Made(seed=0), Made(seed=0), Made(seed=1)]
    for index, run in enumerate([*made, Made(seed=2, error=ValueError("boom"))]):
        run.write(tmp_path / str(index))
    runs = find_runs([str(tmp_path)]).runs
    assert [has_repeats(some) for some in (runs[:3], runs[:4], [*runs[1:3], runs[4]])] == [False, True, False]
    assert [group.label for group in group_over_seeds(runs[:4])] == ["lr=0.01", "lr=0.003"]
    Made(seed=2, keep_gradients=True).write(tmp_path / "5")
    assert named(str(tmp_path / "1"), str(tmp_path / "5")) == ["keep_gradients=false", "keep_gradients=true"]


def compare(cwd: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tpresearch.compare", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=1500)


@pytest.mark.cli
def test_the_command_refuses_in_one_line_and_what_it_proposes_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in (0, 1):
        Made(seed=seed, steps=4).write(tmp_path / "sweep" / str(seed))
    done = compare(tmp_path, "sweep", "seeds=apart")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: train.seed=1: in seed=1, but 0 in seed=0: their losses are not comparable; the same corpus, "
        "tokenizer, row length, global batch, loss and seed, or overlay=anyway; seeds=mean for their mean and spread; "
        "try: python -m tpresearch.compare sweep seeds=mean\n"
    )
    again = Made(seed=0, steps=4).write(tmp_path / "sweep" / "2")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare", "sweep"])
    main()
    said = capsys.readouterr()
    assert said.err == ""
    assert "Mean ± std over train.seed" in said.out
    assert "Left out: sweep/0: sweep/2 repeats it" in said.out
    assert "| 2 | 7.750 ± 0 |" in (tmp_path / "sweep" / "compare.md").read_text()
    shutil.rmtree(again)
    monkeypatch.setattr(sys, "argv", ["compare", "sweep", "overlay=anyway", "out=there"])
    main()
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.startswith("Overlaid although train.seed differs: 0 (seed=0), 1 (seed=1)\n")
    assert said.out.endswith("page: there/compare.html\nPNGs: there/compare/*.png\n")
    assert "| seed=1 | 1 | 7.750 |" in (tmp_path / "there" / "compare.md").read_text()


def test_in_place_of_a_folder_that_cannot_be_written_one_is_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Made(steps=2).write(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["compare", "run", "out=/dev/null"])
    with pytest.raises(ConfigError, match="cannot be written") as refused:
        main()
    assert str(refused.value.fix["out"]).startswith("outputs/compare/")


def test_the_home_of_a_user_who_is_not_there_is_a_name_like_any_other() -> None:
    with pytest.raises(ConfigError, match=r"^run=~nobodys/run: no such folder"):
        find_runs(["~nobodys/run"])


def test_without_what_it_draws_with_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["compare", "run"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "altair" else object())
    with pytest.raises(WrongCommand, match="plots=altair: not installed; the extra `plots`") as refused:
        main()
    assert refused.value.command == "pip install 'tpresearch[plots]'"


def test_neither_comparisons_nor_dashboards_wait_for_torch() -> None:
    modules = "tpresearch.compare.__main__, tpresearch.compare.report, tpresearch.compare.workspace, tpresearch.dashboard"
    program = f"import sys; import {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=1500)
    assert done.stdout == "False\n"
