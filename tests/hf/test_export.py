"""A trained run as a Hugging Face folder, and back: by the commands that a user types."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.commands import ROOT, Done, environment, execute_warm
from support.composed import config
from support.llamas import imported
from support.trainings import TINY, TRAIN

from tpresearch import export
from tpresearch.checkpoint.disk import complete_checkpoints
from tpresearch.checkpoint.load import read_tensors
from tpresearch.config.errors import ConfigError
from tpresearch.data.batches import Batches
from tpresearch.data.pipeline import prepare
from tpresearch.data.rows import PackedCorpus
from tpresearch.hf.files import settings_of, weights_hash
from tpresearch.track.record import read_summary
from tpresearch.verify.ranks import Ranks

transformers = pytest.importorskip("transformers", reason="the reference comes with the hf extra")
pytestmark = pytest.mark.cli

Start = Callable[..., Done]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty folder with some texts in it."""
    home = tmp_path_factory.mktemp("home")
    (home / "texts").mkdir()
    for index in range(60):
        words = " ".join(f"word{index * i % 97}" for i in range(120))
        (home / f"texts/{index}.txt").write_text(words)
    return home


@pytest.fixture(scope="module")
def start(ranks: Ranks, home: Path) -> Start:
    """`start(2, *words)` is torchrun with 2 ranks there, `start(None, *words)` python."""

    def run(size: int | None, *words: str) -> Done:
        env = environment(home, PYTHONPATH=str(ROOT))
        return execute_warm(ranks, size, [str(TRAIN) if w == "train.py" else w for w in words], home, env)

    return run


DATA = ("data=text", "data.path=texts/*.txt", "data.cache_dir=cache", "data.seq_len=16", "logger=none")
RUN = ("train.global_batch_size=8", "train.eval_rows=8", "parallel.loss_parallel=true", *DATA)


@pytest.fixture(scope="module")
def run(start: Start, home: Path) -> Path:
    """Two steps of a Llama with grouped queries, its weights far from where they started."""
    bpe = ["model=llama2_debug", "tokenizer.vocab_size=300", "+model.norm_eps=2e-5", "+model.rope_theta=5000"]
    words = ["parallel=fsdp", "train.steps=2", "hydra.run.dir=run", "optimizer.lr=0.1", "schedule=constant"]
    done = start(2, "train.py", *RUN, *bpe, *words)
    assert done.code == 0, done.err
    return home / "run"


@pytest.fixture(scope="module")
def exported(start: Start, run: Path, home: Path) -> Path:
    done = start(None, "-m", "tpresearch.export", "checkpoint=run", "out=made/llama")
    assert (done.code, done.err) == (0, "")
    said = "made/llama: step 2, 137,024 parameters in float32, 0.5 MB in 1 file, its tokenizer"
    assert done.out.startswith(said)
    return home / "made/llama"


def test_the_folder_is_whole_and_nothing_is_left(exported: Path) -> None:
    names = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in exported.iterdir()} == names | {"tokenizer.json", "tokenizer_config.json"}
    assert [path.name for path in exported.parent.iterdir()] == ["llama"]
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1


def test_ours_to_theirs_to_ours_is_bitwise(run: Path, exported: Path) -> None:
    [*_, newest] = complete_checkpoints(run)
    again = dict(imported(exported).named_parameters())
    saved = dict(read_tensors(newest.folder, [f"model.{name}" for name in again]))
    assert all(torch.equal(saved[f"model.{name}"], weight) for name, weight in again.items())
    settings = settings_of(str(exported))
    assert (settings["norm_eps"], settings["rope_theta"], settings["n_kv_heads"]) == (2e-5, 5000, 4)


def test_a_run_from_it_starts_at_hugging_faces_loss(start: Start, exported: Path, home: Path) -> None:
    """On another plan: `model=hf` needs no other word, the tokenizer comes along, and the first loss is theirs."""
    words = ["model=hf", "init_from=made/llama", "parallel=tp", "train.steps=1", "hydra.run.dir=again", *RUN]
    done = start(2, "train.py", *words)
    assert done.code == 0, done.err
    row = json.loads((home / "again/metrics.jsonl").read_text())  # the only one
    of_home = [f"data.path={home}/texts/*.txt", f"data.cache_dir={home}/cache", f"init_from={exported}"]
    cfg = config(*words[:3], *RUN, *of_home, small=False)
    assert cfg.tokenizer.path == str(exported)
    corpus = prepare(cfg.data, cfg.tokenizer)
    assert isinstance(corpus, PackedCorpus)
    batch = Batches(corpus, 8, cfg.train.seed).batch(0)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        logits = theirs(batch.inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
    assert row["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    assert corpus.eos_id == tokenizer.eos_token_id == theirs.generation_config.eos_token_id
    assert tokenizer.decode(batch.inputs[0]) in {tokenizer.decode(row[:-1]) for row in corpus.train}


def test_a_run_of_ours_gives_its_sizes_and_tokenizer_too(
    start: Start, run: Path, exported: Path, home: Path
) -> None:
    """`model=hf init_from=RUN` starts where the folder that is exported from it does, to the bit."""
    first = {}
    for source in ("run/checkpoints/step-00000002", "made/llama"):
        words = ["model=hf", f"init_from={source}", "parallel=none", "train.steps=1"]
        done = start(None, "train.py", *words, f"hydra.run.dir=of/{source}", *RUN)
        assert done.code == 0, done.err
        row = json.loads((home / "of" / source / "metrics.jsonl").read_text())  # the only one
        first[source] = row["train/loss"], row["train/grad_norm"]
        assert read_summary(home / "of" / source)["initial_weights"] == weights_hash(str(home / source))
    assert len(set(first.values())) == 1


@pytest.mark.parametrize(
    ("made", "said", "tries"),
    [
        (["model=toy_mlp"], "its model is toy_mlp, and model=hf is a Llama", {"model=toy_mlp"}),
        (
            ["model=llama2_debug"],
            "it keeps no tokenizer, since its data had no text",
            {"model=hf", "tokenizer=bpe", "tokenizer.vocab_size=300", "data.seq_len=16"},
        ),
    ],
)
def test_a_run_of_ours_that_does_not_fit_is_refused(
    start: Start, tmp_path: Path, made: list[str], said: str, tries: set[str]
) -> None:
    words = [word for word in TINY if not word.startswith("model=")]
    assert start(None, "train.py", *words, *made, f"hydra.run.dir={tmp_path}/run").code == 0
    refused = start(None, "train.py", "model=hf", f"init_from={tmp_path}/run", "parallel=none")
    assert refused.refusal.startswith(f"error: init_from={tmp_path}/run: {said}; ")
    assert tries <= set(refused.command_to_try)


def test_theirs_to_ours_to_theirs_is_bitwise_by_two_commands(
    start: Start, exported: Path, home: Path
) -> None:
    words = ["init_from=made/llama", "hydra.run.dir=imported", "parallel=fsdp_tp"]
    done = start(2, "-m", "tpresearch.import_hf", *words)
    assert done.code == 0, done.err
    assert done.out == f"{home}/imported/checkpoints/step-00000000: 137,024 parameters of made/llama\n"
    done = start(None, "-m", "tpresearch.export", "checkpoint=imported", "out=back")
    assert done.code == 0, done.err
    for path in exported.iterdir():
        assert (home / "back" / path.name).read_bytes() == path.read_bytes(), path.name
    for words in (["resume=imported"], [*RUN, "model=hf", "init_from=made/llama", "hydra.run.dir=imported"]):
        refused = start(None, "train.py", *words, "parallel=none")
        assert refused.refusal.startswith(f"error: resume={home}/imported: no step was taken there: ")
        assert f"init_from={home}/imported" in refused.command_to_try
    refused = start(None, "-m", "tpresearch.import_hf", "init_from=imported", "model=llama2_debug")
    assert refused.refusal.startswith("error: init_from=imported: it already is a tpresearch run; ")


def test_no_run_is_set_aside_for_an_import(start: Start, run: Path, exported: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"}
    words = ["-m", "tpresearch.import_hf", f"init_from={exported}", "hydra.run.dir=run"]
    refused = start(None, *words)
    assert refused.refusal.startswith("error: hydra.run.dir=run: a run has step-00000002 there, ")
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.name != ".lock"} == before
    assert start(None, *words, "plan_only=true").refusal.startswith("error: plan_only=true: an import writes")


@pytest.mark.usefixtures("run", "exported")
@pytest.mark.parametrize("weights", ["run", "made/llama"])
def test_weights_of_another_tokenizer_are_warned_about(start: Start, home: Path, weights: str) -> None:
    """A BPE of as many entries, trained on other text, is another one."""
    (home / "other.txt").write_text("quaggas and zebras graze " * 200)
    model = ["model=llama2_debug", "+model.norm_eps=2e-5", "+model.rope_theta=5000", "parallel=none"]
    words = [*RUN, *model, "tokenizer.vocab_size=300", f"init_from={weights}", "train.steps=1"]
    warning = f"init_from={weights} is of another tokenizer, whose tokens its embedding knows: "
    assert warning not in start(None, "train.py", *words).err
    done = start(None, "train.py", *words, "data.path=other.txt")
    assert done.code == 0, done.err
    assert done.err.count(warning) == 1


def test_bfloat16_is_the_rounded_checkpoint(start: Start, exported: Path, home: Path) -> None:
    words = ["checkpoint=run/checkpoints/step-00000002", "out=narrow", "dtype=bfloat16"]
    done = start(None, "-m", "tpresearch.export", *words)
    assert done.code == 0, done.err
    narrow, whole = load_file(home / "narrow/model.safetensors"), load_file(exported / "model.safetensors")
    assert all(torch.equal(narrow[name], tensor.bfloat16()) for name, tensor in whole.items())
    assert transformers.AutoConfig.from_pretrained(home / "narrow").dtype == torch.bfloat16


REFUSED = [
    ("checkpoint=run", "out=: required and not given; "),
    ("checkpoint=run out=link", "out=link: already exists; "),
    ("checkpoint=run out=/dev/null/x", "out=/dev/null/x: cannot be written: Not a directory; "),
    ("checkpoint=made out=new", "checkpoint=made: it has no checkpoints/step-*; "),
    (
        "checkpoint=toy out=new",
        "checkpoint=HOME/toy/checkpoints/step-00000001: its model is toy_mlp, for which Hugging Face has no class; one of a llama2_* model, "
        "or of model=hf; for others docs/python.md has a state dict",
    ),
    ("checkpoint=bad out=new", "checkpoint=HOME/bad/checkpoints/step-00000002: not complete: "),
    ("checkpoint=run out=new dtype=int8", "dtype=int8: "),
]


@pytest.fixture(scope="module")
def spoiled(start: Start, run: Path, home: Path) -> None:
    """A run of another model, a checkpoint with a flipped bit, and a link that leads nowhere."""
    (home / "link").symlink_to("nowhere")
    words = [
        "model=toy_mlp",
        "parallel=none",
        "tokenizer.vocab_size=300",
        "train.steps=1",
        "hydra.run.dir=toy",
    ]
    toy = start(None, "train.py", *RUN, *words)
    assert toy.code == 0, toy.err
    shutil.copytree(run, home / "bad")
    file = next((home / "bad").glob("checkpoints/step-*/__0_0.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.usefixtures("spoiled", "exported")
@pytest.mark.parametrize(("typed", "said"), REFUSED, ids=[typed for typed, _ in REFUSED])
def test_what_cannot_be_exported_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch, typed: str, said: str
) -> None:
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "argv", ["export", *typed.split()])
    with pytest.raises(ConfigError) as refused:
        export.main()
    assert str(refused.value).startswith(said.replace("HOME", str(home)))
    assert not list(home.glob("**/.*.draft")) + list(home.glob("new"))


@pytest.mark.usefixtures("exported")
def test_a_refusal_is_one_line_with_a_command_to_try(start: Start) -> None:
    done = start(None, "-m", "tpresearch.export", "checkpoint=run", "out=made/llama")
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done.err
    assert done.refusal.startswith("error: out=made/llama: already exists; a folder that does not exist; ")
    assert done.command_to_try == ["python", "-m", "tpresearch.export", "checkpoint=run", "out=made/llama-2"]


def test_help_is_printed(start: Start) -> None:
    assert "checkpoint=RUN_OR_CHECKPOINT out=FOLDER" in start(None, "-m", "tpresearch.export", "--help").out
