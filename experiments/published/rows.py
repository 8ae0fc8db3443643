"""Published measurements as configs: each row of the CSV is a set of overrides, a world and a cluster."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent


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
        return self.values.get(name) or ""

    def number(self, name: str, default: float = 0) -> float:
        return float(self[name] or default)

    @property
    def world(self) -> int:
        return int(self.number("gpus"))

    @property
    def measured_s(self) -> float | None:
        return self.number("step_s") or None

    def parts(self) -> list[Part]:
        """The configs that stand for it."""
        mode = self["ac"] or "none"
        if mode == "selective_layer":  # every second block whole
            return [self._part("none", 0.5), self._part("full", 0.5)]
        if mode == "selective_block":  # a share of the blocks that the source does not state
            return [self._part("none", None), self._part("full", None)]
        if mode == "selective_op":  # ours keeps every matmul, torchtitan's every second
            return [self._part("selective", 0.5), self._part("full", 0.5)]
        return [self._part(mode, 1.0)]

    def _part(self, checkpointing: str, share: float | None) -> Part:
        return Part((*self._overrides(), f"parallel.activation_checkpointing={checkpointing}"), share)

    def _overrides(self) -> list[str]:
        mpt = self["arch"] == "mpt"
        tp, replicas, shards = (max(1, int(self.number(k, 1))) for k in ("tp", "dp_replicate", "dp_shard"))
        micro = int(self.number("mb", 1))
        rows = micro * replicas * shards * int(self.number("ga", 1))
        found = [
            f"model={'mpt' if mpt else 'llama2_7b'}",
            f"model.name={self['model'] or 'model'}",
            f"model.dim={self['dim']}",
            f"model.n_layers={self['layers']}",
            f"model.n_heads={self['heads']}",
            f"model.ffn_dim={self['ffn']}",
            f"tokenizer.vocab_size={self['vocab']}",
            f"data.seq_len={self['seq']}",
            f"parallel={_plan(tp, replicas, shards, self['sp'] == '1')}",
            f"train.global_batch_size={rows}",
            f"train.micro_batch_size={micro}",
            f"train.dtype={_dtype(self['compute_dtype'] or 'bf16')}",
            f"parallel.compile={str(self['compile'] == '1').lower()}",
        ]
        if not mpt:
            found += [f"model.n_kv_heads={self['kv_heads']}"]
            found += [f"model.tied={str(self['tied'] == '1').lower()}"]
        if tp > 1:
            found += [f"mesh.tp={tp}"]
        if replicas > 1 and shards > 1:
            found += [f"mesh.dp_replicate={replicas}", f"mesh.dp_shard={shards}"]
        if shards > 1 and self["reshard"] == "0":
            found += ["parallel.fsdp.reshard_after_forward=false"]
        if self["reduce_dtype"] == "bf16":
            found += ["parallel.fsdp.reduce_dtype=bfloat16"]
        if self["params_dtype"] == "bf16":
            found += ["train.weights=bfloat16"]
        if self["async_tp"] == "1":
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
    return {"bf16": "bfloat16", "fp32": "float32"}.get(short, short)


def read(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return [Row(values) for values in csv.DictReader(file)]
