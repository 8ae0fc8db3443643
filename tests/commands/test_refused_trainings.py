"""What train.py refuses: one line, exit code 2, nothing left behind, and a command to try that is not refused."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from support.commands import Done, on_path
from support.composed import config
from support.marks import exhaustive
from support.trainings import TRAIN, Start, cases

from tpresearch.config import ConfigError
from tpresearch.config.world import World
from tpresearch.train.preflight import preflight

REFUSED = cases("""
# The mesh and the world.
8 parallel=fsdp_tp mesh.tp=2 mesh.dp_shard=2
    mesh.tp=2: dp_shard=2*tp=2 is 4 ranks, but the world size is 8; mesh.tp=4, or 4 ranks
5 parallel=fsdp_tp mesh.tp=2 mesh.dp_shard=2
    mesh.tp=2: dp_shard=2*tp=2 is 4 ranks, but the world size is 5; 4 ranks
1 plan_only=true world_size=5 parallel=fsdp_tp mesh.tp=2 mesh.dp_shard=2
    mesh.tp=2: dp_shard=2*tp=2 is 4 ranks, but the world size is 5; 4 ranks
4 parallel=hsdp mesh.dp_shard=-1 mesh.dp_replicate=-1
    mesh.dp_shard=-1: mesh.dp_replicate is -1 too; at most one axis can be -1
4 parallel=fsdp mesh.tp=2
    mesh.tp=2: parallel=fsdp does not shard over this axis; it uses mesh.dp_shard; plans with tp: tp sp
4 parallel=fsdp_tp mesh.tp=0
    mesh.tp=0: not a number of ranks; 1 or more, -1 for the remaining ranks
2 parallel=none
    parallel=none: runs on a single process, but the world size is 2; 1 rank, or a plan for several ranks
4 parallel=tp mesh.tp=2
    mesh.tp=2: tp=2 is 2 ranks, but the world size is 4; mesh.tp=4, or a plan with a data axis for the remaining
# What tp does not divide.
1 plan_only=true world_size=4 parallel=tp model.n_heads=6 model.n_kv_heads=6 model.dim=96
    mesh.tp=4: does not divide model.n_heads=6 (rule qkv splits it); legal for this model: 1 2
1 plan_only=true parallel=fsdp_tp mesh.tp=8
    mesh.tp=8: does not divide model.n_kv_heads=4 (rule qkv splits it); legal for this model: 1 2 4
1 plan_only=true world_size=4 parallel=tp model.ffn_dim=190
    mesh.tp=4: does not divide model.ffn_dim=190 (rule ffn_in splits it); legal for this model: 1 2
1 plan_only=true world_size=3 parallel=sp
    mesh.tp=3: does not divide data.seq_len=16 (rule embed splits the sequence); legal for this model: 1 2
3 parallel=sp mesh.tp=3
    mesh.tp=3: does not divide data.seq_len=16 (rule embed splits the sequence); legal for this model: 1 2
# The batch.
3 parallel=fsdp
    train.global_batch_size=8: does not split over 3 data-parallel ranks; a multiple of 3
2 parallel=ddp train.micro_batch_size=3
    train.micro_batch_size=3: does not divide the 4 rows of each data-parallel rank; a divisor of 4
# The data.
1 parallel=none data.path={data}/missing.txt
    data.path={data}/missing.txt: there is no such file (seen from
1 parallel=none data=jsonl data.path={data}/records.jsonl
    data.text_field=text: no such field in {data}/records.jsonl, line 1; one of texts
# The budget, the optimizer, the model and its plan.
1 parallel=none train.tokens=1000
    train.tokens=1000: train.steps=3 is a budget too; one of the two, the other null
1 parallel=none train.steps=null
    train.steps=null: the run has no budget; train.steps or train.
1 parallel=none model.vocab_size=299
    model.vocab_size=299: the tokenizer has 300 entries; at least as many
1 parallel=none model.max_seq_len=8
    model.max_seq_len=8: rows have data.seq_len=16 tokens; at least as many; by default it follows data.seq_len
1 parallel=none optimizer.betas=[0.9]
    optimizer.betas=[0.9]: not AdamW's two; two numbers from 0 to below 1, such as [0.9,0.95]
1 parallel=none optimizer=sgd optimizer.moment_dtype=bfloat16
    optimizer.moment_dtype=bfloat16: an option of AdamW's; optimizer=adamw
1 parallel=none optimizer=sgd optimizer.compile=true
    optimizer.compile=true: an option of AdamW's; optimizer=adamw
1 parallel=none optimizer=sgd optimizer.split_masters=true
    optimizer.split_masters=true: an option of AdamW's; optimizer=adamw
1 parallel=none optimizer.split_masters=true
    optimizer.split_masters=true: train.dtype=float32 computes with the weights themselves; false, or train.dtype=bfloat16
1 parallel=none train.dtype=bfloat16 train.weights=bfloat16 optimizer.split_masters=true
    optimizer.split_masters=true: train.weights=bfloat16 leaves no master weights; false, or train.weights=float32
2 parallel=fsdp train.dtype=bfloat16 optimizer.split_masters=true
    optimizer.split_masters=true: fully_shard keeps float32 weights itself; false, or a plan without it, such as none
1 parallel=none optimizer.momentum=0.5
    optimizer.momentum=0.5: an option of SGD's; optimizer=sgd
2 parallel=fsdp parallel.async_tp=true
    parallel.async_tp=true: there is no tensor parallelism to overlap with; a plan with mesh.tp above 1
1 parallel=none parallel.compile=true model.blocks=[]
    parallel.compile=true: it works block by block, and model llama2_debug has none; false, or model.blocks
1 parallel=none parallel.activation_checkpointing=full model.blocks=[]
    parallel.activation_checkpointing=full: it works block by block, and model llama2_debug has none; none, or
1 parallel=none parallel.activation_checkpointing=budget
    parallel.activation_checkpointing=budget: the compiler chooses what to recompute, but parallel.compile=false; parallel.
2 parallel=ddp parallel.gradient_accumulation_fusion=true train.micro_batch_size=2
    parallel.gradient_accumulation_fusion=true: gradients are sharded, summed over ranks or offloaded; false, or parallel=none
1 parallel=none parallel.gradient_accumulation_fusion=true train.micro_batch_size=2 train.dtype=bfloat16 train.float8=tensorwise
    parallel.gradient_accumulation_fusion=true: a float8 matmul of torchao's adds to nothing; false, or train.float8=none
2 parallel=fsdp train.dtype=bfloat16 parallel.fsdp.reduce_dtype=float64
    parallel.fsdp.reduce_dtype=float64: wider than the float32 gradients; float32 or bfloat16
# Checkpoints and the profiler.
1 parallel=none checkpoint.every=4 checkpoint.keep_every=6
    checkpoint.keep_every=6: with checkpoint.every=4 not every one of these steps has a checkpoint; a multiple of 4
1 parallel=none checkpoint.every=null checkpoint.keep_every=6
    checkpoint.keep_every=6: with checkpoint.every=null not every one of these steps has a checkpoint; null, or a checkpoint.every
1 parallel=none checkpoint.background=sometimes
    checkpoint.background=sometimes: no such choice; true, false or auto
1 parallel=none profiler.memory=true
    profiler.memory=true: the snapshot covers the profiled steps, but profiler=none; profiler=memory
""")
"""As one rank of so many, what is typed after the small config; and how the sentence begins."""
ON_A_CPU = cases("""
2 parallel=tp parallel.async_tp=true
    parallel.async_tp=true: async TP requires parallel.compile=true; parallel.compile=true
2 parallel=tp parallel.async_tp=true parallel.compile=true
    parallel.async_tp=true: async TP needs CUDA devices with peer access, and this is a CPU; false
1 parallel=none profiler=memory profiler.first_step=3 train.steps=4
    profiler.memory=true: a snapshot is of the CUDA allocator, and this is a CPU; profiler=trace on this device
1 parallel=none device=cuda
    device=cuda: torch sees no CUDA device; cpu or auto
""")
ASYNC_TP = "async_tp=true"
"""No other config mends this, once the compiler is there."""
UP_TO_THE_FOLDER = "hydra.run.dir=/dev/null/x"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file that no corpus can be made of."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "records.jsonl").write_text('{"texts": "a b c"}\n')
    return folder


@pytest.mark.parametrize(("typed", "begins"), REFUSED, ids=[typed for typed, _ in REFUSED])
def test_what_is_wrong_is_said_with_what_would_be_legal(
    small: list[str], data: Path, typed: str, begins: str
) -> None:
    size, *words = typed.format(data=data).split()
    cfg = config(*small, *words, small=False)
    with pytest.raises(ConfigError) as refused:
        preflight(cfg, World(size=int(size), local_size=int(size), elastic=size != "1"))
    assert str(refused.value).startswith(begins.format(data=data))


@pytest.mark.cli
@pytest.mark.parametrize(
    ("typed", "begins"), [*ON_A_CPU, *REFUSED[:1], *(exhaustive(*row) for row in REFUSED[1:])]
)
def test_it_is_one_line_that_leaves_nothing_with_a_command_that_is_not_refused(
    train_py: Start, small: list[str], data: Path, tmp_path: Path, typed: str, begins: str
) -> None:
    size, *words = typed.format(data=data).split()
    before = [*small, *words]
    done = train_py(*before, size=int(size))
    check_one_line(done, begins.format(data=data))
    assert not list((tmp_path / "cwd").iterdir())
    starter, *arguments = done.command_to_try
    after = arguments[arguments.index(str(TRAIN)) + 1 :]
    if set(after) < set(before) or ASYNC_TP in typed or any(word.endswith("=VALUE") for word in after):
        return  # what was wrong is left out, and what goes in its place is the default, or only its user knows
    # All that can be refused is refused before the folder: a command whose folder alone is refused is right.
    tried_ranks = 1 if starter == "python" else int(arguments[0].removeprefix("--nproc-per-node="))
    tried = train_py(*after, UP_TO_THE_FOLDER, size=tried_ranks)
    if "plan_only=true" in after:  # which makes none
        assert tried.code == 0, tried.err
    else:
        assert tried.refusal.startswith("error: hydra.run.dir=/dev/null/x: cannot be written: "), (
            tried.refusal
        )


def check_one_line(done: Done, begins: str) -> None:
    assert (done.code, done.out, len(done.err.splitlines())) == (2, "", 1), done
    assert done.err.startswith(f"error: {begins}"), done.err
    _, *legal, try_ = done.refusal.split("; ")
    assert legal
    assert try_.startswith("try: ")


@pytest.mark.cli
@pytest.mark.parametrize(
    ("typed", "why"),
    [
        ("parallel.compile=true", "no C++ compiler is found (no-such-compiler); false on this machine"),
        ("optimizer.compile=true", "no C++ compiler is found (no-such-compiler); false on this machine"),
        (UP_TO_THE_FOLDER, "cannot be written: Not a directory"),
    ],
)
def test_what_the_machine_lacks_is_refused(
    train_py: Start, small: list[str], tmp_path: Path, typed: str, why: str
) -> None:
    done = train_py(*small, "parallel=none", typed, CXX="no-such-compiler", PATH="/nowhere")
    check_one_line(done, f"{typed}: {why}")
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.cli
@pytest.mark.parametrize(
    ("typed", "begins"),
    [
        ("parallel=none train.step=3", "train.step=3: no such key; nearest is train.steps"),
        ("parallel=none hydra.run.dri=x", "hydra.run.dri=x: no such key; nearest is hydra.run.dir"),
        ("plan_only=true world_size=8 parallel=sp", "mesh.tp=8: does not divide model.n_kv_heads=4"),
    ],
)
def test_what_needs_no_torch_is_refused_without_it(
    train: Start, small: list[str], tmp_path: Path, typed: str, begins: str
) -> None:
    """In a new process: what it computes, for a busy machine makes it wait longer."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "torch.py").write_text("raise AssertionError('torch is imported')\n")
    done = train(None, tmp_path / "cwd", *small, *typed.split(), cold=True, **on_path(tmp_path / "lib"))
    check_one_line(done, begins)
    assert done.cpu_seconds < 8  # about 2 where nothing else runs
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.cli
def test_a_corpus_too_short_for_a_batch_is_refused_once_it_is_prepared(
    train: Start, small: list[str], texts: Path, tmp_path: Path
) -> None:
    """Only the prepared rows show it; the batch that is offered splits over the ranks."""
    few_files = f"data.path=[{texts}/00.txt,{texts}/01.txt,{texts}/02.txt]"
    typed = [word for word in small if not word.startswith("data.path")]
    short = [*typed, few_files, "parallel=fsdp", "train.global_batch_size=2000", "logger=none"]
    done = train(2, tmp_path / "cwd", *short)
    assert done.refusal.startswith("error: train.global_batch_size=2000: the train split has ")
    assert " rows of 17 tokens, fewer than one global batch; at most " in done.refusal
    (offered,) = [word for word in done.command_to_try if word.startswith("train.global_batch_size=")]
    rows = int(done.refusal.split("the train split has ")[1].split()[0])
    assert int(offered.partition("=")[2]) == rows // 2 * 2
    assert shlex.join(done.command_to_try).startswith("torchrun --nproc-per-node=2 ")
