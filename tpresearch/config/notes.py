"""Notes on settings that have no effect beside the others, or less than their name promises. They are not refused: a file or a sweep
may set them for other choices.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter

from tpresearch.config.axes import MeshSizes
from tpresearch.config.choices import (
    Checkpointing,
    DataSource,
    Dtype,
    OptimizerName,
    ProfilerName,
    ScheduleName,
    TokenizerKind,
)
from tpresearch.config.errors import format_value
from tpresearch.config.mesh import used_axes
from tpresearch.config.schema import ComposedConfig, Config
from tpresearch.config.validate import total_steps, uses_fully_shard

DEFAULTS = ComposedConfig()
RULES = "model.plans."
OF_WANDB = tuple(f"logger.{key}" for key in ("mode", "project", "entity", "group", "job_type", "tags", "dir"))
HAS_TEXT_FIELD = (DataSource.jsonl, DataSource.parquet, DataSource.hf)


def notes_on_settings(cfg: Config, sizes: MeshSizes, typed: Mapping[str, str]) -> list[str]:
    """A sentence for each reason why settings have no effect; one with its default value is taken to be set by nobody.

    Args:
        typed: overrides by key, for the rules of plans, which have no defaults.
    """
    unused = [(_changed(cfg, keys), why) for keys, why in _unused(cfg, sizes)]
    notes = [_sentence(settings, why) for settings, why in [*unused, _unused_rules(cfg, typed)] if settings]
    steps, warmup = total_steps(cfg), cfg.schedule.warmup_steps
    if steps < warmup:
        reached = f"the learning rate ends at {steps / warmup:.2g} of optimizer.lr"
        notes.append(f"schedule.warmup_steps={warmup} is more than the {steps} of the run: {reached}")
    if cfg.data.source is DataSource.uniform and (length := cfg.data.seq_len) > 1:
        counted = f"each row of data=uniform counts as {length} tokens; 1, by default"
        notes.append(f"data.seq_len={length}: {counted}")
    return notes


def _sentence(settings: list[str], why: str) -> str:
    return f"{' and '.join(settings)} {'have' if len(settings) > 1 else 'has'} no effect: {why}"


def _changed(cfg: Config, keys: Iterable[str]) -> list[str]:
    values = {key: tuple(map(attrgetter(key), (cfg, DEFAULTS))) for key in keys}
    return [f"{key}={format_value(value)}" for key, (value, default) in values.items() if value != default]


def _unused_rules(cfg: Config, typed: Mapping[str, str]) -> tuple[list[str], str]:
    """Overrides of rules that belong to a plan over the tensor axis other than the chosen one."""
    tensor = cfg.parallel.tensor
    rules = {key: value for key, value in typed.items() if key.startswith(RULES)}
    others = [f"{key}={value}" for key, value in rules.items() if key.split(".")[2] != tensor]
    has = f"the rules of {RULES}{tensor}" if tensor else "no rules"
    return others, f"parallel={cfg.parallel.name} has {has}"


def _unused(cfg: Config, sizes: MeshSizes) -> Iterator[tuple[tuple[str, ...], str]]:
    """Keys that nothing reads with these settings, and why."""
    parallel, data, train = cfg.parallel, cfg.data, cfg.train
    if cfg.optimizer.name is not OptimizerName.adamw:
        yield ("optimizer.betas", "optimizer.eps"), "they are AdamW's"
    if not cfg.optimizer.weight_decay:
        yield ("optimizer.decay_vectors",), "optimizer.weight_decay=0"
    if cfg.schedule.name is ScheduleName.constant:
        yield ("schedule.min_lr_ratio",), "schedule=constant lowers no learning rate"
    if cfg.schedule.name is not ScheduleName.wsd:
        yield ("schedule.decay_ratio",), "it is an option of schedule=wsd"
    if sizes.tp == 1:
        yield ("parallel.loss_parallel",), "no logits are sharded where mesh.tp is 1"
    if not uses_fully_shard(parallel, sizes):
        yield ("parallel.fsdp.reshard_after_forward",), "no weights are sharded over data-parallel ranks"
    if train.dtype is not Dtype.bfloat16:
        yield ("parallel.fsdp.reduce_dtype",), f"gradients are summed in train.dtype={train.dtype}"
    elif sizes.dp == 1 and not parallel.fsdp.cpu_offload:
        yield ("parallel.fsdp.reduce_dtype",), "there is one data-parallel rank"
    if parallel.activation_checkpointing is not Checkpointing.budget:
        yield ("parallel.activation_budget",), "it is of parallel.activation_checkpointing=budget"
    if data.source is not DataSource.hf:
        yield ("data.name", "data.split"), f"data={data.source} is no dataset that has them; data=hf"
    if data.source not in HAS_TEXT_FIELD:
        yield ("data.text_field",), f"data={data.source} has no fields"
    if data.source is not DataSource.uniform:
        yield ("data.width",), "it is an option of data=uniform"
    if data.is_synthetic:
        yield ("data.max_tokens", "data.held_out_every"), f"data={data.source} is drawn as it is read"
        if cfg.tokenizer.kind is TokenizerKind.bpe:  # of the other kind, it tells vocab_size
            yield ("tokenizer.path",), f"data={data.source} has no text"
        if train.eval_every and train.eval_rows:
            yield ("train.eval_every", "train.eval_rows"), f"data={data.source} has no held-out rows"
    if not cfg.logger.wandb:
        yield OF_WANDB, "W&B is off; logger=wandb"
    if cfg.profiler.name is ProfilerName.none:
        yield ("profiler.first_step", "profiler.steps"), "profiler=none; profiler=trace"
    if sizes.dp == 1:
        both = ("defects.weights_per_rank", "defects.overlapping_batches")
        yield both, "there is one data-parallel rank"
    if used_axes(parallel) and cfg.world_size not in (None, sizes.world):
        yield ("world_size",), f"torchrun has started {sizes.world} ranks"
    if cfg.cluster:
        tells_sizes = cfg.model.name == "hf" or cfg.tokenizer.kind is TokenizerKind.hf
        keys = ("resume",) if tells_sizes else ("resume", "init_from")
        yield keys, "a simulated step has no weights"
    else:
        yield ("gpus",), "it is an option of python -m tpresearch.planner"
        yield ("trace",), "it is an option of python -m tpresearch.simulate; profiler=trace"
    of_verify = ("verify.plans", "verify.world_size", "verify.steps", "verify.integers")
    yield of_verify, "python -m tpresearch.verify reads it"
