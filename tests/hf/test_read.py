"""What each rank of each plan reads of a Hugging Face folder, against Hugging Face's own model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from support.composed import corpus
from support.llamas import CPU, MakeLlama, configured, imported, relative_difference
from support.made_checkpoints import save
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from tpresearch.checkpoint.collective import checkpoint_group
from tpresearch.config import ConfigError
from tpresearch.config.schema import Config
from tpresearch.config.validate import validate
from tpresearch.config.world import World
from tpresearch.data.rows import PackedCorpus
from tpresearch.hf.read import check_same_weights, from_hugging_face
from tpresearch.launch import Run
from tpresearch.parallel.apply import parallelize
from tpresearch.parallel.device import CPU as CPU_DEVICE
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.parallel.weights import held_indices, local_part, materialize
from tpresearch.train import main
from tpresearch.train.preflight import plan_model, preflight
from tpresearch.verify.ranks import Ranks

if TYPE_CHECKING:
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

transformers = pytest.importorskip("transformers", reason="the reference comes with the hf extra")


@pytest.mark.parametrize("settings", [{}, {"num_key_value_heads": 8}, {"tie_word_embeddings": True}])
def test_logits_are_hugging_faces(make_llama: MakeLlama, settings: dict[str, object]) -> None:
    folder = make_llama(**settings)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert relative_difference(imported(folder), theirs) < 1e-6


def test_in_float64_logits_are_hugging_faces_to_1e_12(
    make_llama: MakeLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once both of its spots that always compute in float32 are kept from it, and our table of float32 from us."""
    folder = make_llama(torch.float64)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ours = imported(folder, "train.dtype=float64")
    assert 1e-9 < relative_difference(ours, theirs) < 1e-6
    llama = transformers.models.llama.modeling_llama
    head_dim, theta = 12, 20000.0
    angles = torch.outer(
        torch.arange(40.0).double(), theta ** (-torch.arange(0, head_dim, 2).double() / head_dim)
    )

    def norm(self: LlamaRMSNorm, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)

    def rotary(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat((angles, angles), -1)[position_ids[0]][None]
        return both.cos(), both.sin()

    monkeypatch.setattr(llama.LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(llama.LlamaRotaryEmbedding, "forward", rotary)
    ours.rotary = torch.stack((angles.cos(), angles.sin()), -1)
    assert relative_difference(ours, theirs) < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_widened(make_llama: MakeLlama, dtype: torch.dtype) -> None:
    folder = make_llama(dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert relative_difference(imported(folder), theirs) < 1e-6


MESHES = {
    "none": (1, "parallel=none"),
    "ddp": (2, "parallel=ddp"),
    "tp": (2, "parallel=tp"),
    "sp": (2, "parallel=sp"),
    "fsdp": (4, "parallel=fsdp"),
    "hsdp": (4, "parallel=hsdp"),
    "fsdp_tp": (4, "parallel=fsdp_tp mesh.tp=2"),
    "hsdp_tp": (8, "parallel=hsdp_tp"),
}
"""Ranks and overrides. fsdp and fsdp_tp cut key heads in the middle; tp cuts dim 1 of wo and w2."""


def shards(
    world: World, folder: Path, configs: dict[str, tuple[int, Config]]
) -> dict[str, dict[str, object]]:
    """By mesh, the parameters whose shard on this rank differs from its part of the whole, and the bytes it holds."""
    whole = dict(imported(folder).named_parameters())
    found: dict[str, dict[str, object]] = {}
    for case, (size, cfg) in configs.items():
        if world.rank >= size:
            continue
        model, plan = plan_model(cfg, sizes := validate(cfg, size))
        dist.init_process_group("fake", store=FakeStore(), rank=world.rank, world_size=size)
        try:
            parallelize(model, plan, cfg.parallel, build_mesh(sizes, "cpu"), cfg.train.dtype)
            materialize(model, CPU, from_hugging_face(str(folder), cfg.model))
            differ, own = [], 0
            for name, parameter in model.named_parameters():
                expected = whole[name].detach()
                for dim, index in enumerate(held_indices(parameter)):
                    expected = expected.index_select(dim, index)
                own += expected.numel()
                if not torch.equal(local_part(parameter), expected):
                    differ.append(name)
            found[case] = {"differ": differ, "held": own}
        finally:
            dist.destroy_process_group()
    return found


def test_each_rank_of_each_plan_reads_its_part(llama: Path, ranks: Ranks) -> None:
    configs = {case: (size, configured(llama, *typed.split())) for case, (size, typed) in MESHES.items()}
    by_rank = ranks.run(4, shards, llama, configs)
    for case, (size, _) in MESHES.items():
        assert [found[case]["differ"] for found in by_rank[:size]] == [[]] * min(size, 4), case
    numbers = sum(p.numel() for p in imported(llama).parameters())
    for case in ("none", "fsdp", "fsdp_tp"):  # nothing of which is held twice, but for norms along tp
        held_by_all = sum(found[case]["held"] for found in by_rank[: MESHES[case][0]])
        assert held_by_all == numbers + (5 * 96 if case == "fsdp_tp" else 0), case


def start_from(world: World, folders: list[Path]) -> str:
    """What a new run is refused for whose hosts have a folder each."""
    cfg = configured(folders[world.rank], "parallel=ddp", f"init_from={folders[world.rank]}")
    pretended = {"prepare": lambda *_, **__: corpus(vocab=263), "check_same_job": lambda *_: None}
    with (
        patch.multiple(main, **pretended),
        patch.object(PackedCorpus, "save_tokenizer"),
        pytest.raises(ConfigError) as refused,
    ):
        main.train(preflight(cfg, world), Run(folders[world.rank], world))
    return str(refused.value)


def compare_weights(world: World, folders: list[Path]) -> str:
    with process_group(CPU_DEVICE, world), pytest.raises(ConfigError) as refused:
        check_same_weights(str(folders[world.rank]), checkpoint_group())
    return str(refused.value)


def test_hosts_of_which_one_has_a_run_in_place_of_the_folder_are_refused(
    llama: Path, ranks: Ranks, tmp_path: Path
) -> None:
    save(run := tmp_path / "run", 3)
    folders = [llama, run]
    for folder, said in zip(folders, ranks.run(2, compare_weights, folders), strict=True):
        assert said.startswith(f"init_from={folder}: on some hosts it holds other weights; ")


def test_a_host_with_other_weights_of_the_same_shapes_is_refused(
    make_llama: MakeLlama, ranks: Ranks, tmp_path: Path
) -> None:
    mine = make_llama()
    shutil.copytree(mine, tmp_path / "other")
    weights = load_file(file := tmp_path / "other" / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 3] += 1
    save_file(weights, file)
    folders = [mine, tmp_path / "other"]
    for folder, said in zip(folders, ranks.run(2, start_from, folders), strict=True):
        assert said.startswith(f"init_from={folder}: on some hosts it holds other weights; ")
