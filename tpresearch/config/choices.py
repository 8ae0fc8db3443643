"""Enums of the config: every key with a fixed set of choices."""

from __future__ import annotations

from enum import StrEnum

TensorPlan = StrEnum("TensorPlan", "tp sp")
DataPlan = StrEnum("DataPlan", "none ddp fsdp hsdp")
Checkpointing = StrEnum("Checkpointing", "none selective full budget")
Dtype = StrEnum("Dtype", "float32 bfloat16 float64")
WeightDtype = StrEnum("WeightDtype", "float32 bfloat16")
Float8 = StrEnum("Float8", "none tensorwise rowwise")
ProfilerName = StrEnum("ProfilerName", "none trace")
SlurmCluster = StrEnum("SlurmCluster", "slurm local")
DataSource = StrEnum("DataSource", "pystdlib pysource text jsonl parquet hf uniform random_tokens")
TokenizerKind = StrEnum("TokenizerKind", "bpe hf")
OptimizerName = StrEnum("OptimizerName", "adamw sgd")
ScheduleName = StrEnum("ScheduleName", "constant cosine wsd")
Loss = StrEnum("Loss", "next_token sum")
OnNonfinite = StrEnum("OnNonfinite", "stop skip")
WandbMode = StrEnum("WandbMode", "auto online offline")
DeviceKind = StrEnum("DeviceKind", "auto cpu cuda")
