"""The choices of every key that has a fixed number of them."""

from __future__ import annotations

from enum import StrEnum


class TensorPlan(StrEnum):
    tp = "tp"
    sp = "sp"


class DataPlan(StrEnum):
    none = "none"
    ddp = "ddp"
    fsdp = "fsdp"
    hsdp = "hsdp"


class Checkpointing(StrEnum):
    none = "none"
    selective = "selective"
    full = "full"
    budget = "budget"


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float64 = "float64"


class ProfilerName(StrEnum):
    none = "none"
    trace = "trace"


class WeightDtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"


class Float8(StrEnum):
    none = "none"
    tensorwise = "tensorwise"
    rowwise = "rowwise"


class SlurmCluster(StrEnum):
    slurm = "slurm"
    local = "local"


class DataSource(StrEnum):
    pystdlib = "pystdlib"
    pysource = "pysource"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    hf = "hf"
    uniform = "uniform"
    random_tokens = "random_tokens"

    @property
    def is_synthetic(self) -> bool:
        """Rows are drawn as they are read: no files, no tokenizer, nothing to prepare, nothing held out."""
        return self in (DataSource.uniform, DataSource.random_tokens)


class TokenizerKind(StrEnum):
    bpe = "bpe"
    hf = "hf"


class OptimizerName(StrEnum):
    adamw = "adamw"
    sgd = "sgd"


class ScheduleName(StrEnum):
    constant = "constant"
    cosine = "cosine"
    wsd = "wsd"


class Loss(StrEnum):
    next_token = "next_token"
    sum = "sum"


class OnNonfinite(StrEnum):
    stop = "stop"
    skip = "skip"


class WandbMode(StrEnum):
    auto = "auto"
    online = "online"
    offline = "offline"


class DeviceKind(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
