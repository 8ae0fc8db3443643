"""The configs that stand for a published row: overrides of simulate's."""

from __future__ import annotations

import re
from dataclasses import dataclass

from published.row import Row

from tpresearch.config.errors import ConfigError

UNSUPPORTED_AXES = {"pp": "pipeline", "cp": "context", "ep": "expert"}
CHECKPOINTING = {
    **dict.fromkeys(("", "0", "no", "false", "off"), "none"),
    **dict.fromkeys(("1", "yes", "true", "on"), "full"),
    "op": "selective_op",
    "layer": "selective_layer",
    "selective_attention": "none",  # whose backward computes it again anyway
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


GATED, PLAIN = re.compile("glu|silu|swish"), re.compile("gelu|relu")
OF_GPT = re.compile("mpt|gpt|\bopt\b|bloom|falcon|pythia|neox|starcoder|megatron|turing")
OF_LLAMA = re.compile("llama|mistral|qwen|\byi\b|olmo|gemma|internlm|baichuan|deepseek|smollm|granite|phi-?3")
OTHER = re.compile(r"moe|mixtral|mixture|mamba|rwkv|bert|\bt5\b|\bvit\b|switch")
"""Families by their names; other ones have layers that are not here."""
HAND_FUSED = ("megatron", "megatron-lm", "nemo", "llm.c", "flash-attention")
ALL_FUSED = re.compile(r"fused [^;.]*(swiglu|gelu|dense)", re.IGNORECASE)
"""Software, and words of a row, whose elementwise ops are written as few kernels by hand: priced as compiled ones are."""
OVERLAPPING = ("nemo",)
"""Software that overlaps the messages of tensor parallelism with matmuls unless it is told otherwise (NeMo's launcher,
conf/training/nemotron/nemotron_15b.yaml and others: ub_tp_comm_overlap)."""


@dataclass(frozen=True)
class Part:
    """One config that stands for a share of a row's blocks: a row that checkpoints every second block has two."""

    overrides: tuple[str, ...]
    share: float | None
    """None: the smallest share of the last part with which the step fits the card."""


def parts(row: Row) -> list[Part]:
    """The configs that stand for it.

    Raises:
        ConfigError: for what a row does not state, and for what is not here.
    """
    for name in UNSUPPORTED_AXES:
        if row.number(name) > 1:
            raise ConfigError(
                name, row[name], f"there is no {UNSUPPORTED_AXES[name]} parallelism here", "1", {}
            )
    if row.is_float8 and row.gpu in ("A100", "A800"):
        raise ConfigError("compute_dtype", row["compute_dtype"], "an A100 has no float8", "bf16", {})
    stated = re.sub("[ -]+", "_", row["ac"].lower())
    mode = CHECKPOINTING.get(stated, stated)

    def part(checkpointing: str, share: float | None) -> Part:
        return Part((*_overrides(row), f"parallel.activation_checkpointing={checkpointing}"), share)

    if mode == "selective_layer":  # every second block whole
        return [part("none", 0.5), part("full", 0.5)]
    if mode == "selective_block":  # a share of the blocks, which the source states only through its HFU
        share = CHECKPOINTED.get((row.engine, row.gpu, row["model"], row.is_true("compile")))
        return [part("none", share and 1 - share), part("full", share)]
    if mode == "selective_op":  # ours keeps every matmul, torchtitan's every second
        return [part("selective", 0.5), part("full", 0.5)]
    return [part(mode, 1.0)]


def is_gpt(row: Row) -> bool:
    """Whether it has GPT's blocks, not Llama's: by its feed-forward, else by its name.

    Raises:
        ConfigError: for families that have other layers.
    """
    kind, names = row["ffn_kind"].lower(), f"{row['arch']} {row['model']}".lower()
    if OTHER.search(names) or row.number("experts") > 1:
        raise ConfigError("arch", row["arch"] or row["model"], "it has other layers", "llama or gpt", {})
    if GATED.search(kind) or PLAIN.search(kind):
        return not GATED.search(kind)
    if not row["arch"] and not row["model"]:
        return False
    if not OF_GPT.search(names) and not OF_LLAMA.search(names):
        raise ConfigError("arch", row["arch"] or row["model"], "an unknown family", "llama or gpt", {})
    return bool(OF_GPT.search(names))


def is_hand_fused(row: Row) -> bool:
    return row.engine in HAND_FUSED or bool(ALL_FUSED.search(row["notes"]))


def overlaps_tensor_messages(row: Row) -> bool:
    """Whether tensor-parallel messages are sent in chunks beside the matmuls that need or make them."""
    if row.tp == 1:
        return False
    return row.is_true("async_tp") if row["async_tp"] else row.engine in OVERLAPPING and row.is_true("sp")


def _overrides(row: Row) -> list[str]:
    tp, replicas, shards = row.tp, row.replicas, row.shards
    (micro, batches), dim, heads, gpt = row.batch, row.count("dim"), row.count("heads"), is_gpt(row)
    compiled = row.is_true("compile") or is_hand_fused(row)
    found = [
        f"model={'gpt' if gpt else 'llama2_7b'}",
        f"model.name={re.sub('[^A-Za-z0-9_.-]', '-', row['model']) or 'model'}",
        f"model.dim={dim}",
        f"model.n_layers={row.count('layers')}",
        f"model.n_heads={heads}",
        f"model.n_kv_heads={row.count('kv_heads', heads)}",
        f"model.ffn_dim={row.count('ffn', 4 * dim if gpt else None)}",
        f"model.tied={str(row.is_true('tied') if row['tied'] else gpt).lower()}",
        f"tokenizer.vocab_size={row.count('vocab')}",
        f"data.seq_len={row.count('seq')}",
        f"parallel={_plan(tp, replicas, shards, row.is_true('sp'))}",
        f"train.global_batch_size={micro * batches * replicas * shards}",
        f"train.micro_batch_size={micro}",
        f"train.dtype={_dtype(row['compute_dtype'])}",
        f"parallel.compile={str(compiled).lower()}",
    ]
    if gpt:
        found += _positions(row["pos"].lower())
    if tp > 1:
        found += [f"mesh.tp={tp}"]
    if tp > 1 and replicas * shards > 1 and not row.is_true("sp"):
        found += ["parallel.tensor=tp"]
    if replicas > 1 and (shards > 1 or tp > 1):
        found += [f"mesh.dp_replicate={replicas}", f"mesh.dp_shard={shards}"]
    if shards > 1 and row["reshard"].lower() in ("0", "false", "no"):
        found += ["parallel.fsdp.reshard_after_forward=false"]
    if row["reduce_dtype"] == "bf16" and row.engine != "kempnerforge":  # whose policy says float32
        found += ["parallel.fsdp.reduce_dtype=bfloat16"]
    if row["params_dtype"] == "bf16":
        found += ["train.weights=bfloat16"]
    if overlaps_tensor_messages(row):
        found += ["parallel.async_tp=true"]
    if tp > 1 and "no loss-parallel" in row["notes"]:
        found += ["parallel.loss_parallel=false"]
    return found


def _positions(stated: str) -> list[str]:
    """Rotary ones, or none, where the row says so; ALiBi costs nothing beside attention."""
    if not stated or "learn" in stated or "abs" in stated:
        return []
    kind = "rope" if "ro" in stated else "none"
    return [f"model.positions={kind}", "~model.plans.sp.places"]


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
