"""What a state may hold: frozen, unused and tied weights, float32 masters, buffers, micro-batches; and what never is saved."""

from __future__ import annotations

import errno
import io
import math
import os
import pickle
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock, patch

import pytest
import torch
from support.checkpointed import Went, calls, equal, go, on_disk
from support.composed import config, corpus
from support.made_checkpoints import save
from support.marks import exhaustive
from support.nets import Buffered, Frozen, Tied, Unused, model
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    TensorProperties,
    TensorStorageMetadata,
)

from tpresearch.checkpoint import load
from tpresearch.checkpoint.disk import (
    BrokenCheckpoint,
    WrittenFile,
    folder_of,
    read_checkpoint,
    sync_and_checksum,
)
from tpresearch.checkpoint.load import (
    _MetadataUnpickler,
    check_initial_weights,
    read_tensors,
    tensors_of,
    verify,
)
from tpresearch.checkpoint.save import check_finite
from tpresearch.checkpoint.state import make_destination
from tpresearch.config import Config, ConfigError
from tpresearch.config.world import World
from tpresearch.data.rows import PackedCorpus
from tpresearch.launch import Run
from tpresearch.models.toy_mlp import ToyLM
from tpresearch.plan.meta import meta_model
from tpresearch.train.main import open_tracker
from tpresearch.train.preflight import preflight
from tpresearch.train.saving import check_disk, checkpoint_bytes, log_resumption
from tpresearch.train.state import TrainState
from tpresearch.verify.ranks import Ranks

KINDS = {
    "frozen": [*model(Frozen), "train.dtype=float64"],
    "unused": [*model(Unused), "train.dtype=float64"],
    "tied": [*model(Tied), "train.dtype=float64"],
    "buffered": [*model(Buffered), "train.dtype=float64"],
    "bfloat16": ["model=toy_mlp", "train.dtype=bfloat16"],
    "bfloat16 weights": ["model=toy_mlp", "train.dtype=bfloat16", "train.weights=bfloat16"],
    "bfloat16 moments": ["model=toy_mlp", "train.dtype=bfloat16", "optimizer.moment_dtype=bfloat16"],
    "compiled update": ["model=toy_mlp", "train.dtype=bfloat16", "optimizer.compile=true"],
    "micro-batches": ["model=toy_mlp", "train.micro_batch_size=2"],
    "sgd without momentum": ["model=toy_mlp", "optimizer=sgd"],
}


def alone(cfg: Config, steps: int, start: Path | None = None, run: Path | None = None, at: int = 0) -> Went:
    went = go(World(), cfg, steps, start, run, (at,))
    assert went
    return went


@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_bitwise(tmp_path: Path, kind: str) -> None:
    cfg = config("parallel=none", *KINDS[kind])
    never_stopped = alone(cfg, 4, run=tmp_path, at=2)
    went = alone(cfg, 2, start=folder_of(tmp_path, 2))
    assert equal(went.state, never_stopped.state)
    assert went.losses == never_stopped.losses[2:]


@pytest.mark.parametrize(
    "kind", [exhaustive("frozen"), "unused", exhaustive("tied"), "bfloat16", "bfloat16 moments"]
)
def test_another_plan_restores_it_to_the_bit(ranks: Ranks, tmp_path: Path, kind: str) -> None:
    alone(config("parallel=none", *KINDS[kind]), 2, run=tmp_path, at=2)
    saved = folder_of(tmp_path, 2)
    went = ranks.run(2, go, config("parallel=fsdp", *KINDS[kind]), 0, saved)[0]
    assert equal(went.restored, on_disk(saved))


@pytest.mark.parametrize(
    ("kind", "saved", "absent"),
    [
        ("unused", {"model.unused.weight", "optimizer.embed.weight.exp_avg"}, "optimizer.unused."),
        ("tied", {"model.embed.weight"}, "model.output."),
    ],
)
def test_what_is_not_there_is_not_saved_and_a_tied_weight_once(
    tmp_path: Path, kind: str, saved: set[str], absent: str
) -> None:
    alone(config("parallel=none", *KINDS[kind]), 2, run=tmp_path, at=2)
    names = set(tensors_of(read_checkpoint(folder_of(tmp_path, 2))))
    assert saved <= names
    assert not [name for name in names if name.startswith(absent)]


class Rising(ToyLM):
    """Whose logits grow with each step, by a number that it keeps as torch's state_dict would have it."""

    rise = 1.0

    def forward(self, tokens: Tensor, head: object = None) -> Tensor:
        self.rise += self.training
        return super().forward(tokens) * self.rise

    def get_extra_state(self) -> float:
        return self.rise

    def set_extra_state(self, state: float) -> None:
        self.rise = state


def test_state_of_a_model_that_no_checkpoint_has_is_named(tmp_path: Path) -> None:
    cfg = config("parallel=none", *model(Rising))
    never_stopped = alone(cfg, 4, run=tmp_path, at=2)
    assert alone(cfg, 2, start=folder_of(tmp_path, 2)).losses != never_stopped.losses[2:]
    (note,) = preflight(cfg, World()).notes
    assert note.startswith("the model: what its get_extra_state returns is in no checkpoint: a run that res")


def test_a_bfloat16_run_saves_its_float32_weights(tmp_path: Path) -> None:
    went = alone(config("parallel=none", *KINDS["bfloat16"]), 2, run=tmp_path, at=2)
    saved = on_disk(folder_of(tmp_path, 2))
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert equal(saved, went.state)


@pytest.mark.parametrize("kind", ["bfloat16", "bfloat16 weights", "bfloat16 moments", "frozen"])
def test_the_room_that_a_checkpoint_takes_is_known_before_the_first(tmp_path: Path, kind: str) -> None:
    cfg = config("parallel=none", *KINDS[kind])
    needed = checkpoint_bytes(preflight(cfg, World()))
    saved = alone(cfg, 1, run=tmp_path, at=1).state.values()
    assert needed == sum(tensor.nbytes for tensor in saved if tensor.dim()), "all but the counts of updates"


@pytest.mark.parametrize(
    ("overrides", "there", "wanted"),
    [
        ("checkpoint=last", 0, 1),
        ("checkpoint.every=1000", 0, 1),
        ("checkpoint.every=2", 0, 2),
        ("checkpoint.every=1", 0, 3),
        ("checkpoint.every=1 checkpoint.keep=1", 0, 2),
        ("checkpoint.every=1", 2, 1),
        ("checkpoint.every=1 checkpoint.keep=1 checkpoint.keep_every=2", 0, 3),
        ("checkpoint.every=1 checkpoint.keep=1 checkpoint.keep_every=2", 2, 1),
        ("checkpoint.every=1 checkpoint.keep=1 checkpoint.keep_every=1", 0, 4),
        ("checkpoint.every=1 checkpoint.keep=1 checkpoint.keep_every=1", 2, 2),
        ("checkpoint.every=1 checkpoint.keep_every=1", 1, 3),
    ],
)
def test_a_disk_needs_room_for_what_is_kept_and_one_more_or_for_all_that_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: str, there: int, wanted: int
) -> None:
    job = preflight(config("parallel=none", "model=toy_mlp", "train.steps=4", *overrides.split()), World())
    found = [read_checkpoint(save(tmp_path, step)) for step in range(there, 0, -1)]
    room = wanted * checkpoint_bytes(job)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=room))
    check_disk(job, Run(tmp_path, World()), found)
    room -= 1
    said = f" free, and {f'{wanted} checkpoints take' if wanted > 1 else 'a checkpoint takes'} "
    with pytest.raises(ConfigError, match=said) as refused:
        check_disk(job, Run(tmp_path, World()), found)
    if keep := refused.value.fix.get("checkpoint.keep"):
        job.cfg.checkpoint.keep = int(str(keep))
        check_disk(job, Run(tmp_path, World()), found)
    is_fewest = wanted <= 2 or "keep_every" in overrides
    assert bool(keep) != is_fewest, "one that is kept, and one that is being written"
    job.cfg.train.steps = there or 1
    room = 0
    check_disk(job, Run(tmp_path, World()), found or [read_checkpoint(save(tmp_path, 1))])


def test_a_disk_that_has_no_room_for_the_tokenizer_is_refused(tmp_path: Path) -> None:
    job = preflight(config("parallel=none", "model=toy_mlp"), World())
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = rf"^hydra\.run\.dir={tmp_path}: cannot be written: No space left on device;"
    with (
        patch.object(PackedCorpus, "save_tokenizer", side_effect=full),
        pytest.raises(ConfigError, match=said),
    ):
        open_tracker(job, Run(tmp_path, World()), corpus(), "", [])


@pytest.mark.parametrize(
    ("name", "rates"),
    [("cosine", "is 0.0854 instead of 0.05"), ("constant", "stays 0.1"), ("wsd", "is 0.075 instead of 0.05")],
)
def test_where_a_budget_has_grown_it_is_told_what_becomes_of_the_learning_rate(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, rates: str
) -> None:
    typed = "schedule.warmup_steps=0", "schedule.min_lr_ratio=0", "schedule.decay_ratio=1", "optimizer.lr=0.1"
    cfg = config("parallel=none", "model=toy_mlp", f"schedule={name}", *typed, "train.steps=8")
    with caplog.at_level("INFO"):
        saved = read_checkpoint(save(tmp_path, 2))
        log_resumption(
            [replace(saved, manifest=replace(saved.manifest, steps=4))], 2, preflight(cfg, World())
        )
    assert [record.message for record in caplog.records] == [
        f"resumes from step 2 of 8: {saved.folder}",
        f"the budget has grown from 4 to 8 steps: the learning rate of the next step {rates}",
    ]


@pytest.mark.parametrize(("first", "told"), [(4, False), (5, True)])
def test_where_too_few_steps_are_left_to_be_profiled_it_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, first: int, told: bool
) -> None:
    asked = "profiler=trace", "profiler.steps=3", f"profiler.first_step={first}"
    cfg = config("parallel=none", "model=toy_mlp", "train.steps=8", *asked)
    saved = read_checkpoint(save(tmp_path, 2))
    log_resumption([replace(saved, manifest=replace(saved.manifest, steps=8))], 2, preflight(cfg, World()))
    said = (
        "no profile is written: it would end with step 7 of this process, and 6 are left; profiler.first_step"
    )
    assert [record.message for record in caplog.records] == [said] * told


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_state_that_is_not_finite_is_never_saved(value: float) -> None:
    state = {"model.a": torch.zeros(3), "model.empty": torch.zeros(0, 4), "model.n": torch.ones(2).long()}
    check_finite(state)
    state["model.b"] = torch.zeros(4, 4)
    state["model.b"][3, 2] = value
    with pytest.raises(BrokenCheckpoint, match=r"model\.b is not finite"):
        check_finite(state)
    with pytest.raises(BrokenCheckpoint) if math.isnan(value) else nullcontext():
        check_finite(state, buffers={"model.b"})


def test_first_weights_are_compared_by_name_and_shape(tmp_path: Path) -> None:
    cfg = config("parallel=none", "model=toy_mlp")
    alone(cfg, 1, run=tmp_path, at=1)
    saved = read_checkpoint(folder_of(tmp_path, 1))
    check_initial_weights(saved, meta_model(cfg.model))
    for other, said in {
        "model.dim=32": r"model\.embed\.weight is \[260, 64\] in it and \[260, 32\] here",
        f"model._target_={Unused.__module__}.Unused": r"model\.unused\.\w+ is in this model alone",
    }.items():
        with pytest.raises(BrokenCheckpoint, match=said):
            check_initial_weights(saved, meta_model(config("parallel=none", "model=toy_mlp", other).model))


def test_settings_that_shapes_do_not_show_are_warned_about(tmp_path: Path) -> None:
    typed = ["parallel=none", "model=llama2_debug", "data=random_tokens"]
    alone(config(*typed), 1, run=tmp_path, at=1)
    new = [*typed, f"init_from={tmp_path}"]
    assert preflight(config(*new, "model.max_seq_len=99"), World()).notes == ()
    job = preflight(config(*new, "model.n_heads=4", "model.n_kv_heads=2", "+model.rope_theta=5e5"), World())
    was = f"init_from={tmp_path} was trained with model."
    assert set(job.notes) == {
        f"{was}n_heads=8, and this model has 4",
        f"{was}n_kv_heads=4, and this model has 2",
        f"{was}rope_theta=10000.0, and this model has 500000.0",
    }


def test_weights_alone_begin_a_new_run(ranks: Ranks, tmp_path: Path) -> None:
    alone(config("parallel=none", "model=toy_mlp", "train.dtype=float64"), 3, run=tmp_path, at=3)
    saved = folder_of(tmp_path, 3)
    weights = {name: tensor for name, tensor in on_disk(saved).items() if name.startswith("model.")}
    for size, plan, dtype in ((2, "fsdp", "float64"), (2, "tp", "float32")):
        typed = [f"parallel={plan}", f"train.dtype={dtype}", f"init_from={saved}", "train.seed=9"]
        went = ranks.run(size, go, config("model=toy_mlp", *typed), 0)[0]
        assert equal(went.state, {name: tensor.to(getattr(torch, dtype)) for name, tensor in weights.items()})


def test_tensors_are_read_one_by_one_without_ranks(tmp_path: Path) -> None:
    went = alone(config("parallel=none", "model=toy_mlp", "train.dtype=float64"), 1, run=tmp_path, at=1)
    folder = folder_of(tmp_path, 1)
    (found,) = read_tensors(folder, ["model.output.weight"])
    assert found[1].dtype == torch.float64
    assert torch.equal(found[1], went.state["model.output.weight"])
    with pytest.raises(BrokenCheckpoint, match=r"it does not contain model\.x"):
        list(read_tensors(folder, ["model.x"]))


def test_a_file_that_has_changed_is_not_loaded_nor_tensors_of_another_shape(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config("parallel=none", "model=toy_mlp")
    alone(cfg, 1, run=tmp_path, at=1)
    saved = folder_of(tmp_path, 1)
    with pytest.raises(ConfigError, match=r"\[260, 64\] in it and \[260, 32\] here"):
        alone(config("parallel=none", "model=toy_mlp", "model.dim=32"), 0, saved)
    with pytest.raises(ConfigError, match=r"state of embed\.weight, which this model lacks"):
        alone(config("parallel=none", "model=llama2_debug"), 0, saved)
    assert caplog.text.count(f"{saved} cannot be loaded: ") == 2
    content = bytearray((saved / "__0_0.distcp").read_bytes())
    content[len(content) // 2] ^= 1
    (saved / "__0_0.distcp").write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"can be loaded; step-00000001: __0_0\.distcp is not as it was writt"
    ):
        alone(cfg, 0, saved)
    said = (
        rf"^init_from={saved}: step-00000001 cannot be read: __0_0\.distcp is not as it was written; another"
    )
    with pytest.raises(ConfigError, match=said):
        alone(config("parallel=none", "model=toy_mlp", f"init_from={saved}"), 0)


def test_of_several_ranks_each_verifies_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = read_checkpoint(save(tmp_path, 3))
    files = {f"__{rank}_0.distcp": WrittenFile(rank, 0) for rank in range(7)}
    read: list[str] = []
    monkeypatch.setattr(load, "find_damage", lambda _, some: read.extend(name for name, _ in some))
    monkeypatch.setattr(load, "on_all_ranks", lambda do, group: do())
    for size in (1, 3, 9):
        read.clear()
        for rank in range(size):
            group: Any = Mock(rank=Mock(return_value=rank), size=Mock(return_value=size))
            verify(replace(saved, manifest=replace(saved.manifest, files=files)), group)
        assert sorted(read) == sorted(files)


def test_what_a_checkpoint_lacks_is_absent_whatever_was_read_of_a_damaged_one_before() -> None:
    layer = nn.Linear(2, 2)
    state = TrainState(0, layer, torch.optim.AdamW(layer.parameters()))
    for names in (["weight", "bias"], ["weight"]):
        properties = TensorProperties(torch.float32)
        saved = {
            f"optimizer.{name}.exp_avg": TensorStorageMetadata(
                properties, layer.get_parameter(name).shape, []
            )
            for name in names
        }
        make_destination(state, {}, saved)
        assert list(state.optimizer.state) == [layer.get_parameter(name) for name in names]


def test_metadata_that_is_damaged_or_would_run_code_is_refused(tmp_path: Path) -> None:
    alone(config("parallel=none", "model=toy_mlp"), 1, run=tmp_path, at=1)
    saved, own = read_checkpoint(folder_of(tmp_path, 1)), "torch.distributed.checkpoint.metadata"
    metadata = saved.folder / ".metadata"
    sealed = replace(saved.manifest, files={".metadata": saved.manifest.files[".metadata"]})
    with pytest.raises(BrokenCheckpoint, match=r"names __0_0\.distcp, which is not a file of this checkp"):
        tensors_of(replace(saved, manifest=sealed))
    metadata.write_bytes(pickle.dumps(["model.embed.weight"]))
    sealed = replace(saved.manifest, files={".metadata": sync_and_checksum(metadata)})
    with pytest.raises(BrokenCheckpoint, match=r"\.metadata describes no tensors"):
        tensors_of(replace(saved, manifest=sealed))
    for module, name in (
        *(("builtins", "eval"), ("os", "system"), ("torch", "load"), ("pathlib", "Path.touch")),
        *((own, "os"), (own, "os.system"), (own, "Metadata.__init__")),
    ):
        metadata.write_bytes(calls(module, name, "1"))
        with pytest.raises(BrokenCheckpoint, match=r"\.metadata is not as it was written"):
            tensors_of(saved)
        sealed = replace(saved.manifest, files={".metadata": sync_and_checksum(metadata)})
        with pytest.raises(BrokenCheckpoint, match=f"has {module}.{name} in it, which is nothing of a tens"):
            tensors_of(replace(saved, manifest=sealed))


class _ByGetattr:
    """Pickled as Python 3.11.0 to 3.11.3 pickle an enum's member."""

    def __init__(self, owner: object, name: str) -> None:
        self.of = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, self.of


def test_an_enums_member_is_read_however_python_pickled_it() -> None:
    def read(owner: object, name: str) -> Any:
        return _MetadataUnpickler(io.BytesIO(pickle.dumps(_ByGetattr(owner, name)))).load()

    contiguous = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert read(_MEM_FORMAT_ENCODING, contiguous.name) is contiguous
    for owner, name in ((_MEM_FORMAT_ENCODING, "mro"), (TensorStorageMetadata, "__init__")):
        with pytest.raises(BrokenCheckpoint, match=r"builtins\.getattr of"):
            read(owner, name)
