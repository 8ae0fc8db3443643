"""Folders that are refused before anything is read, each in one line; and the hub, through its own client."""

from __future__ import annotations

import http.server
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.composed import config
from support.llamas import MakeLlama, configured, imported
from support.nobody import as_nobody
from torch import Tensor

from tpresearch.config import ConfigError
from tpresearch.config.choices import TokenizerKind
from tpresearch.config.validate import validate
from tpresearch.data import hub as hub_room
from tpresearch.hf.files import is_hugging_face
from tpresearch.hf.llama import read_settings
from tpresearch.hf.read import check_weights
from tpresearch.plan.meta import meta_model

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(llama: Path, tmp_path: Path) -> Path:
    """A copy of a Llama in several files, to spoil."""
    return shutil.copytree(llama, tmp_path / "llama")


def refusal(folder: Path | str, *overrides: str, **model: Any) -> str:
    """What is said of a folder for the model of a config: by default the one that config.json describes."""
    with pytest.raises(ConfigError) as refused:
        check(folder, *overrides, **model)
    return str(refused.value)


def check(folder: Path | str, *overrides: str, **model: Any) -> None:
    cfg = config(*overrides) if overrides else configured(folder)
    cfg.model.args.update(model)
    check_weights(str(folder), cfg.model, meta_model(cfg.model))


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_a_folder_that_fits_is_not_refused(folder: Path) -> None:
    check(folder)
    assert is_hugging_face(str(folder))
    assert not is_hugging_face(str(folder.parent))


CANNOT = {
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
    "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
    "attention_bias": True,
    "mlp_bias": True,
    "hidden_act": "gelu",
    "head_dim": 16,
    "attention_dropout": 0.1,
    "sliding_window": 1024,
    "quantization_config": {"quant_method": "fp8"},
    "partial_rotary_factor": 0.5,
    "model_type": "qwen2",
}


@pytest.mark.parametrize("key", CANNOT)
def test_what_our_model_does_not_compute_is_refused_by_name(folder: Path, key: str) -> None:
    edit(folder / "config.json", **{key: CANNOT[key]})
    said = refusal(folder)
    assert said.startswith(f"init_from={folder}: config.json has {key}=")
    assert "which our Llama2 does not implement" in said


def test_older_ways_to_say_the_rotary_base_are_read(folder: Path) -> None:
    path = folder / "config.json"
    edit(path, rope_parameters=None, rope_theta=5e5)
    assert read_settings(folder, "")["rope_theta"] == 5e5
    edit(path, rope_parameters={"rope_type": "default", "rope_theta": 7e5})  # transformers 5 takes this one
    assert read_settings(folder, "")["rope_theta"] == 7e5
    edit(path, rope_parameters=None, rope_theta=None, rope_scaling={"type": "default"})
    assert read_settings(folder, "")["rope_theta"] == 10000.0
    edit(path, num_key_value_heads=None, rms_norm_eps=None)
    settings = read_settings(folder, "")
    assert (settings["n_kv_heads"], settings["norm_eps"]) == (8, 1e-6)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": "96"}, "config.json has hidden_size=96; a whole number in hidden_size"),
        ({"num_hidden_layers": None}, "config.json has no num_hidden_layers; "),
        ({"rms_norm_eps": -1.0}, "config.json has rms_norm_eps=-1.0; a number above 0"),
        ({"tie_word_embeddings": "no"}, "config.json has tie_word_embeddings=no; true or false"),
    ],
)
def test_a_wrong_value_in_config_json_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    edit(folder / "config.json", **changes)
    assert f"init_from={folder}: {said}" in refusal(folder)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"dim": 192}, "model.dim=192: config.json of FOLDER has hidden_size=96; 96, or model=hf"),
        ({"n_kv_heads": 4}, "model.n_kv_heads=4: config.json of FOLDER has num_key_value_heads=2; "),
        ({"norm_eps": 1e-5}, "model.norm_eps=1e-05: config.json of FOLDER has rms_norm_eps=2e-05; "),
        ({"rope_theta": 1e4}, "model.rope_theta=10000.0: config.json of FOLDER has rope_theta=20000.0; "),
        ({"tied": True}, "model.tied=true: config.json of FOLDER has tie_word_embeddings=false; "),
    ],
)
def test_a_model_of_other_sizes_is_refused(folder: Path, model: dict[str, Any], said: str) -> None:
    assert refusal(folder, **model).startswith(said.replace("FOLDER", str(folder)))


def test_a_tokenizer_with_more_entries_than_the_embedding_is_refused_by_its_own_key(folder: Path) -> None:
    hf = ("parallel=none", "model=hf", f"init_from={folder}")
    cfg = config(*hf, "tokenizer=bpe", "tokenizer.vocab_size=264")
    said = f"264 entries, and the embedding of {folder} has 263; a tokenizer of at most 263"
    with pytest.raises(ConfigError) as refused:
        validate(cfg, 1)
    assert str(refused.value) == f"tokenizer.vocab_size=264: {said}"
    assert refused.value.fix == {"tokenizer.vocab_size": 263}
    cfg.tokenizer.kind, cfg.tokenizer.path = TokenizerKind.hf, "mine"
    with pytest.raises(ConfigError) as refused:
        validate(cfg, 1)
    assert str(refused.value) == f"tokenizer.path=mine: {said}"


def test_a_shorter_context_is_not_another_model(folder: Path) -> None:
    check(folder, max_seq_len=16)


def test_another_model_is_refused(folder: Path) -> None:
    said = refusal(folder, "model=toy_mlp", "tokenizer.vocab_size=263")
    assert said.startswith(f"init_from={folder}: it holds a Llama, but this model has no setting max_seq_len")


def shard_with(folder: Path, tensor: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][tensor]


def change_tensors(folder: Path, tensor: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = shard_with(folder, tensor)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


NORM, HEAD = "model.norm.weight", "lm_head.weight"


def unindexed(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][NORM]
    (folder / INDEX).write_text(json.dumps(index))


def pickled(folder: Path) -> None:
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"not looked at")


def truncated(folder: Path) -> None:
    path = shard_with(folder, NORM)
    path.write_bytes(path.read_bytes()[:-1])


def with_bias(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(folder, NORM, lambda tensors: tensors.update({name: torch.zeros(96)}))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = index["weight_map"][NORM]
    (folder / INDEX).write_text(json.dumps(index))


SPOILED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), "it has no config.json"),
    "torn config": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read: "),
    "list": (lambda f: (f / "config.json").write_text("[1]"), "config.json is not an object"),
    "config folder": (
        lambda f: ((f / "config.json").unlink(), (f / "config.json").mkdir()),
        "config.json cannot be read: Is a directory",
    ),
    "lost file": (lambda f: shard_with(f, NORM).unlink(), "cannot be read: "),
    "lost tensor": (
        lambda f: change_tensors(f, NORM, lambda tensors: tensors.pop(NORM)),
        f"{INDEX} says that {NORM} is in ",
    ),
    "unindexed": (unindexed, f"no file of it has {NORM}"),
    "other shape": (
        lambda f: change_tensors(f, NORM, lambda tensors: tensors.update({NORM: torch.ones(95)})),
        f"{NORM} has the shape [95], and the model's is [96]",
    ),
    "integers": (
        lambda f: change_tensors(f, NORM, lambda t: t.update({NORM: torch.ones(96, dtype=torch.int8)})),
        f"{NORM} is stored as I8, not as one of F64, F32, BF16, F16",
    ),
    "bias": (with_bias, "it has model.layers.0.self_attn.q_proj.bias, which the model does not"),
    "truncated": (truncated, "cannot be read: "),
    "not safetensors": (lambda f: shard_with(f, NORM).write_bytes(b"\0" * 64), "cannot be read: "),
    "pickle": (pickled, "pytorch_model.bin is a pickle, which may run code when it is read"),
    "empty": (lambda f: [p.unlink() for p in f.glob("*.safetensors*")], "has neither model.safetensors nor"),
    "outside": (
        lambda f: edit(f / INDEX, weight_map={NORM: "../model.safetensors"}),
        f"{INDEX} names ../model.safetensors, which is not a file of this folder",
    ),
    "absolute": (lambda f: edit(f / INDEX, weight_map={NORM: "/etc/passwd"}), f"{INDEX} names /etc/passwd"),
    "number": (lambda f: edit(f / INDEX, weight_map={NORM: 3}), f"{INDEX} cannot be read: TypeError"),
    "dangling": (
        lambda f: ((path := shard_with(f, NORM)).unlink(), path.symlink_to("nowhere")),
        "cannot be read: ",
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_folder_is_refused_in_one_line(folder: Path, how: str) -> None:
    cfg = configured(folder)
    spoil, said = SPOILED[how]
    spoil(folder)
    with pytest.raises(ConfigError) as refused:
        check_weights(str(folder), cfg.model, meta_model(cfg.model))
    assert refused.value.field == "init_from"
    assert said in str(refused.value)


@pytest.mark.parametrize("pattern", ["config.json", "model-00001-*", INDEX])
def test_a_file_that_may_not_be_read_is_refused(llama: Path, pattern: str) -> None:
    with tempfile.TemporaryDirectory() as above:
        Path(above).chmod(0o755)
        folder = shutil.copytree(llama, Path(above) / "llama")
        cfg = configured(folder)
        model = meta_model(cfg.model)
        check_weights(str(folder), cfg.model, model)
        next(folder.glob(pattern)).chmod(0)
        with as_nobody(), pytest.raises(ConfigError, match=r"cannot be read: .*Permission denied"):
            check_weights(str(folder), cfg.model, model)
        folder.chmod(0)
        with as_nobody():
            assert not is_hugging_face(str(folder))


def test_what_older_versions_kept_beside_the_weights_is_left(make_llama: MakeLlama) -> None:
    folder = make_llama()
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, path)
    check(folder)


def test_a_tied_weight_may_be_there_twice_if_it_is_the_same(make_llama: MakeLlama) -> None:
    folder = make_llama(tie_word_embeddings=True)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {HEAD: tensors["model.embed_tokens.weight"].clone()}, path)
    check(folder)
    save_file(tensors | {HEAD: tensors["model.embed_tokens.weight"] + 1}, path)
    assert "config.json ties lm_head.weight to model.embed_tokens.weight, but they differ" in refusal(folder)


class Hub(http.server.SimpleHTTPRequestHandler):
    """One model of the hub, by the part of its protocol that a download needs."""

    commit = "0" * 39 + "1"
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        *_, name = self.path.partition("?")[0].split("/")
        self.asked.append(f"{self.command} {name}")
        files = [path for path in Path(self.directory).iterdir() if path.is_file()]
        if "/tree/" in self.path:
            sizes = {f.name: f.stat().st_size for f in files}
            listed = [{"type": "file", "path": f, "size": size, "oid": f} for f, size in sizes.items()]
            body, kind = json.dumps(listed).encode(), "application/json"
        elif self.path.startswith("/api/"):
            siblings = [{"rfilename": f.name} for f in files]
            about = {"id": "owner/llama", "sha": self.commit, "siblings": siblings}
            body, kind = json.dumps(about).encode(), "application/json"
        else:
            body, kind = (Path(self.directory) / name).read_bytes(), "application/octet-stream"
        self.send_response(200)
        headers = {"Content-Type": kind, "X-Repo-Commit": self.commit, "ETag": f'"{name}"'}
        for header, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(header, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A hub that serves `folder` as owner/llama, and a cache of the test's own; the requests that it had."""
    asked: list[str] = []
    handler = type("OfFolder", (Hub,), {"asked": asked})
    of_folder = partial(handler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), of_folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    constants = {"ENDPOINT": endpoint, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "hub")}
    constants["HUGGINGFACE_CO_URL_TEMPLATE"] = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in constants.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    forget()
    yield asked
    server.shutdown()
    forget()


def forget() -> None:
    """What this process has found out about the hub."""
    hub_room.offline_unless_reachable.cache_clear()
    hub_room._snapshot.cache_clear()


def test_a_hub_id_is_downloaded_by_the_files_that_its_index_names(folder: Path, hub: list[str]) -> None:
    (folder / "consolidated.safetensors").write_bytes(b"the same weights under other names")
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    assert is_hugging_face("owner/llama")
    check("owner/llama")
    got = [line.removeprefix("GET ") for line in hub if line.startswith("GET") and "." in line]
    weights = {path.name for path in folder.glob("model-*.safetensors")}
    assert len(weights) > 1
    assert sorted(got) == sorted({"config.json", INDEX, *weights})
    downloaded, here = dict(imported("owner/llama").named_parameters()), imported(folder)
    assert all(torch.equal(downloaded[name], weight) for name, weight in here.named_parameters())


def test_a_plan_of_a_hub_id_downloads_no_weights(hub: list[str]) -> None:
    cfg = configured("owner/llama")
    check_weights("owner/llama", cfg.model, meta_model(cfg.model), download=False)
    assert [line for line in hub if line.startswith("GET") and "." in line] == ["GET config.json"]


def test_a_hub_that_is_gone_is_one_line_unless_it_was_downloaded(
    hub: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    check("owner/llama")
    monkeypatch.setattr(hub_room, "is_reachable", lambda url: False)
    forget()
    hub.clear()
    check("owner/llama")
    assert hub == []
    assert "cannot be reached, and there is no such file here" in refusal("owner/other")
