"""Folders that we write, as Hugging Face's own library reads them, and as we read them again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.llamas import MakeLlama, imported, relative_difference
from torch import Tensor, nn

from tpresearch.config import ConfigError
from tpresearch.hf.export import write_config, write_weights
from tpresearch.hf.llama import read_settings

transformers = pytest.importorskip("transformers", reason="the reference comes with the hf extra")


def written(model: nn.Module, settings: dict[str, Any], folder: Path, dtype: torch.dtype, shard: int) -> Path:
    """The folder of a model, its parameters handed over one at a time."""
    parameters = dict(model.named_parameters())

    def read(names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        return ((name, parameters[name].detach()) for name in names)

    folder.mkdir()
    sizes = {name: parameter.numel() for name, parameter in parameters.items()}
    write_weights(folder, sizes, read, settings["dim"] // settings["n_heads"], dtype, shard)
    write_config(folder, settings, dtype, None, 7)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize(
    ("settings", "shard", "files"),
    [
        ({}, 4 * 10**9, 1),
        ({}, 150_000, 8),
        ({"tie_word_embeddings": True, "num_key_value_heads": 8}, 300_000, 4),
    ],
)
def test_theirs_to_ours_to_theirs_is_bitwise(
    make_llama: MakeLlama, tmp_path: Path, settings: dict[str, Any], shard: int, files: int
) -> None:
    theirs = make_llama(**settings)
    ours = imported(theirs)
    again = written(ours, read_settings(theirs, "theirs"), tmp_path / "again", torch.float32, shard)
    names = {path.name for path in again.glob("*.safetensors")}
    assert len(names) == files, names
    assert all(path.stat().st_size < shard * 1.1 or files == 1 for path in again.glob("*.safetensors"))
    before, after = tensors(theirs), tensors(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert read_settings(again, "again") == read_settings(theirs, "theirs")
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(again)
    assert relative_difference(ours, reloaded) < 1e-6
    assert (reloaded.generation_config.eos_token_id, reloaded.config.bos_token_id) == (7, None)
    assert reloaded.config.rope_parameters["rope_theta"] == 20000.0
    assert reloaded.dtype == torch.float32


def test_the_index_names_the_file_of_each_tensor(make_llama: MakeLlama, tmp_path: Path) -> None:
    theirs = make_llama()
    folder = written(imported(theirs), read_settings(theirs, ""), tmp_path / "split", torch.bfloat16, 150_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(folder).values())
    for file in set(index["weight_map"].values()):
        assert load_file(folder / file).keys() == {n for n, f in index["weight_map"].items() if f == file}
    theirs_narrow = {name: tensor.bfloat16() for name, tensor in tensors(theirs).items()}
    assert all(torch.equal(tensor, theirs_narrow[name]) for name, tensor in tensors(folder).items())


def test_a_number_too_large_for_the_dtype_is_refused(make_llama: MakeLlama, tmp_path: Path) -> None:
    folder = make_llama()
    model = imported(folder)
    with torch.no_grad():
        model.get_parameter("layers.1.feed_forward.w2.weight")[3, 5] = 7e4
    with pytest.raises(ConfigError, match=r"dtype=float16: layers\.1\..*w2\.weight has numbers up to 7e"):
        written(model, read_settings(folder, ""), tmp_path / "narrow", torch.float16, 10**9)
