"""Published measurements as configs: each row of the CSV is a set of overrides, a world and a cluster."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

from tpresearch.config.errors import ConfigError

NUMBER = re.compile(r"[~≈]?\s*([0-9][0-9, _]*(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/ ]*)")
"""A number, perhaps with separators and a unit behind it: 80GB, 1,914, 400 Gbps."""
UNITS = {
    "ms": 1e-3,
    "us": 1e-6,
    "k": 1024,
    "K": 1024,
    "GB/s": 8,
    "GiB/s": 8,
    "Tbps": 1000,
    "Tbit/s": 1000,
    "Tb/s": 1000,
}
"""What is not in the column's own unit: seconds, tokens, Gbit/s."""
GPUS = ("A100", "H100", "H200", "B200", "L40S")
YES = ("1", "true", "yes")
FLOAT8 = re.compile("fp8|float8")
ABSENT = {"pp": "pipeline", "cp": "context", "ep": "expert"}
CHECKPOINTING = {
    **dict.fromkeys(("", "0", "no", "false", "off"), "none"),
    **dict.fromkeys(("1", "yes", "true", "on"), "full"),
    "op": "selective_op",
    "layer": "selective_layer",
}
CHECKPOINTED = {
    ("fms-fsdp", "A100", "llama2-13b", True): 0.39,
    ("fms-fsdp", "A100", "codellama-34b", True): 1.0,
    ("fms-fsdp", "A100", "llama2-70b", True): 1.0,
    ("fms-fsdp", "H100", "llama2-13b", True): 0.21,
    ("fms-fsdp", "H100", "codellama-34b", True): 0.87,
    ("fms-fsdp", "H100", "llama2-70b", True): 0.71,
    ("fms-fsdp", "A100", "llama2-13b", False): 0.47,
    ("fms-fsdp", "H100", "llama2-13b", False): 0.43,
}
"""Share of blocks that ran forward twice: 3 (HFU / MFU - 1), from the table of both in fms-fsdp's README (compiled) and in
PyTorch's blog of March 2024."""


@dataclass(frozen=True)
class Part:
    """One config that stands for a share of a row's blocks: a row that checkpoints every second block has two."""

    overrides: tuple[str, ...]
    share: float | None
    """None: the smallest share of the last part with which the step fits the card."""


@dataclass(frozen=True)
class Row:
    """One published measurement."""

    values: dict[str, str]

    def __getitem__(self, name: str) -> str:
        """What a column states; empty where it states nothing or is not there."""
        return (self.values.get(name) or "").strip()

    def number(self, name: str, default: float = 0) -> float:
        """Raises: ConfigError: for what is no number."""
        if not self[name] or self[name].lower() in ("na", "n/a", "nan", "none", "-", "?"):
            return default
        found = NUMBER.fullmatch(self[name])
        if not found:
            raise ConfigError(name, self[name], "not a number", "a number", {})
        return float(re.sub("[, _]", "", found[1])) * self._unit(name, found[2].strip())

    @staticmethod
    def _unit(name: str, unit: str) -> float:
        return 1000 if unit.lower() == "k" and name == "tok_s_gpu" else UNITS.get(unit, 1)

    def count(self, name: str, default: int | None = None) -> int:
        """Raises: ConfigError: for what is no whole number of 1 or more; for an empty cell without a default."""
        value = self.number(name, default or 0)
        if value < 1 or value != int(value):
            raise ConfigError(name, self[name] or None, "a row needs it", "a whole number of 1 or more", {})
        return int(value)

    def says(self, name: str) -> bool:
        return self[name].lower() in YES

    @property
    def engine(self) -> str:
        """torchtitan of torchtitan/fsdp2."""
        return self["engine"].partition("/")[0].lower()

    @property
    def gpu(self) -> str:
        """A100 of `NVIDIA A100-SXM4-80GB`."""
        words = self["gpu"].upper()
        return next((name for name in GPUS if re.search(f"(?<!G){name}(?![0-9])", words)), words)

    @property
    def is_float8(self) -> bool:
        return bool(FLOAT8.search(self["compute_dtype"].lower()))

    @property
    def world(self) -> int:
        return self.count("gpus")

    @property
    def measured_s(self) -> float | None:
        """From the tokens per second where no step is stated."""
        rate = self.number("tok_s_gpu")
        if self["step_s"] or not rate:
            return self.number("step_s") or None
        tp, replicas = self.count("tp", 1), self.count("dp_replicate", 1)
        ranks = replicas * self.count("dp_shard", max(1, self.world // (tp * replicas)))
        tokens = self.count("mb", 1) * self.count("ga", 1) * ranks * self.count("seq")
        return tokens / (rate * self.world)

    def parts(self) -> list[Part]:
        """The configs that stand for it."""
        for name in ABSENT:
            if self.number(name) > 1:
                raise ConfigError(name, self[name], f"there is no {ABSENT[name]} parallelism here", "1", {})
        stated = re.sub("[ -]+", "_", self["ac"].lower())
        mode = CHECKPOINTING.get(stated, stated)
        if mode == "selective_layer":  # every second block whole
            return [self._part("none", 0.5), self._part("full", 0.5)]
        if mode == "selective_block":  # a share of the blocks, which the source states only through its HFU
            share = CHECKPOINTED.get((self.engine, self.gpu, self["model"], self.says("compile")))
            return [self._part("none", share and 1 - share), self._part("full", share)]
        if mode == "selective_op":  # ours keeps every matmul, torchtitan's every second
            return [self._part("selective", 0.5), self._part("full", 0.5)]
        return [self._part(mode, 1.0)]

    def _part(self, checkpointing: str, share: float | None) -> Part:
        return Part((*self._overrides(), f"parallel.activation_checkpointing={checkpointing}"), share)

    def _overrides(self) -> list[str]:
        mpt = self["arch"] in ("mpt", "gpt") or (self["arch"] != "llama" and self["ffn_kind"] == "gelu")
        tp, replicas = self.count("tp", 1), self.count("dp_replicate", 1)
        shards = self.count("dp_shard", max(1, self.world // (tp * replicas)))
        dim, heads, micro = self.count("dim"), self.count("heads"), self.count("mb", 1)
        ffn = self.count("ffn", 4 * dim if mpt else None)
        found = [
            f"model={'mpt' if mpt else 'llama2_7b'}",
            f"model.name={re.sub('[^A-Za-z0-9_.-]', '-', self['model']) or 'model'}",
            f"model.dim={dim}",
            f"model.n_layers={self.count('layers')}",
            f"model.n_heads={heads}",
            f"model.ffn_dim={ffn}",
            f"tokenizer.vocab_size={self.count('vocab')}",
            f"data.seq_len={self.count('seq')}",
            f"parallel={_plan(tp, replicas, shards, self.says('sp'))}",
            f"train.global_batch_size={micro * replicas * shards * self.count('ga', 1)}",
            f"train.micro_batch_size={micro}",
            f"train.dtype={_dtype(self['compute_dtype'])}",
            f"parallel.compile={str(self.says('compile')).lower()}",
        ]
        if not mpt:
            found += [f"model.n_kv_heads={self.count('kv_heads', heads)}"]
            found += [f"model.tied={str(self.says('tied')).lower()}"]
        if tp > 1:
            found += [f"mesh.tp={tp}"]
        if replicas > 1 and shards > 1:
            found += [f"mesh.dp_replicate={replicas}", f"mesh.dp_shard={shards}"]
        if shards > 1 and self["reshard"] == "0":
            found += ["parallel.fsdp.reshard_after_forward=false"]
        if self["reduce_dtype"] == "bf16" and self.engine != "kempnerforge":  # whose policy says float32
            found += ["parallel.fsdp.reduce_dtype=bfloat16"]
        if self["params_dtype"] == "bf16":
            found += ["train.weights=bfloat16"]
        if self.says("async_tp"):
            found += ["parallel.async_tp=true"]
        if tp > 1 and "no loss-parallel" in self["notes"]:
            found += ["parallel.loss_parallel=false"]
        return found


def _plan(tp: int, replicas: int, shards: int, sequence: bool) -> str:
    data = "hsdp" if replicas > 1 and shards > 1 else "fsdp" if shards > 1 else "ddp" if replicas > 1 else ""
    if tp == 1:
        return data or "none"
    if data == "ddp":
        return "hsdp_tp"
    return f"{data}_tp" if data else "sp" if sequence else "tp"


def _dtype(short: str) -> str:
    """float8 is bfloat16 with faster matmuls; see `engines`."""
    if not short or re.search("bf16|bfloat16|fp16|float16|fp8|float8", short.lower()):
        return "bfloat16"
    return {"fp32": "float32"}.get(short.lower(), short)


def read(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8-sig", errors="replace") as file:
        return [
            Row({k: v for k, v in values.items() if k and isinstance(v, str)})
            for values in csv.DictReader(file)
        ]
