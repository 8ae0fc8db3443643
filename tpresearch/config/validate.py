"""Validation of the config alone, and the numbers that follow from it: no torch, no files, no ranks."""

from __future__ import annotations

import dataclasses
import math
from operator import attrgetter

from tpresearch.config.axes import MeshSizes
from tpresearch.config.choices import Checkpointing, Float8, Loss, OptimizerName, WeightDtype
from tpresearch.config.errors import ConfigError, format_value
from tpresearch.config.mesh import resolve_mesh, used_axes
from tpresearch.config.schema import Config, Dtype, ParallelConfig, ProfilerName, TokenizerKind
from tpresearch.config.values import check_bounds

DEFAULT_PLAN_RANKS = 4
"""Default number of ranks for plan_only: that of `make train`."""


OPTIMIZER_OPTIONS = {
    OptimizerName.adamw: ("optimizer.moment_dtype", "optimizer.compile", "optimizer.split_masters"),
    OptimizerName.sgd: ("optimizer.momentum",),
}
"""Keys that another optimizer refuses."""


def validate(cfg: Config, world: int, hosts: int = 1) -> MeshSizes:
    """The sizes of the mesh for a job of `world` ranks on `hosts` hosts; refuses a config for its first error."""
    check_bounds(cfg)
    _check_name(cfg)
    _check_betas(cfg)
    _check_optimizer_options(cfg)
    _check_budget(cfg)
    _check_vocabulary(cfg)
    _check_length(cfg)
    _check_checkpoints(cfg)
    _check_profiler(cfg)
    _check_precision(cfg)
    sizes = resolve_mesh(cfg.mesh, cfg.parallel, planned_world(cfg) if cfg.plan_only else world, hosts)
    _check_plan_options(cfg, sizes)
    if not cfg.plan_only:  # which reads no rows, and takes a batch that fits
        _check_batch(cfg, sizes)
    return sizes


def with_batch_that_fits(cfg: Config, sizes: MeshSizes) -> Config:
    """For plan_only: the next larger global batch that splits over the mesh, or the given one if it does."""
    split = sizes.dp * (cfg.train.micro_batch_size or 1)
    rows = -(-cfg.train.global_batch_size // split) * split
    return dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, global_batch_size=rows))


def planned_world(cfg: Config) -> int:
    """The number of ranks for plan_only: world_size, else as many as a run would need."""
    return cfg.world_size or ranks_of_mesh(cfg, DEFAULT_PLAN_RANKS)


def ranks_needed(cfg: Config, open_ranks: int) -> int:
    """The number of ranks that a command starts: the product of its mesh sizes, or `open_ranks` if they leave it open."""
    if cfg.plan_only or cfg.cluster or not used_axes(cfg.parallel):  # a simulated step is one process
        return 1
    return cfg.world_size or ranks_of_mesh(cfg, open_ranks)


def ranks_of_mesh(cfg: Config, open_ranks: int) -> int:
    """The product of the mesh sizes; if some are open, its greatest multiple up to `open_ranks`, at least itself."""
    sizes = [getattr(cfg.mesh, axis.name) for axis in used_axes(cfg.parallel)]
    given = [size for size in sizes if size is not None and size > 0]
    product = math.prod(given)
    return product if len(given) == len(sizes) else max(product, open_ranks // product * product)


def micro_batch_size(cfg: Config, sizes: MeshSizes) -> int:
    """Rows per data-parallel rank and forward pass."""
    return cfg.train.micro_batch_size or cfg.train.global_batch_size // sizes.dp


def micro_batches(cfg: Config, sizes: MeshSizes) -> int:
    """Micro-batches per data-parallel rank and optimizer step."""
    return cfg.train.global_batch_size // sizes.dp // micro_batch_size(cfg, sizes)


def tokens_per_step(cfg: Config) -> int:
    return cfg.train.global_batch_size * cfg.data.seq_len


def total_steps(cfg: Config) -> int:
    """Optimizer steps of the run, from whichever budget is given."""
    if cfg.train.steps is not None:
        return cfg.train.steps
    assert cfg.train.tokens is not None
    return -(-cfg.train.tokens // tokens_per_step(cfg))


def needs_logits(cfg: Config) -> bool:
    """Whether the loss is a cross-entropy, or that on held-out rows, which is one whatever train.loss is."""
    evaluates = cfg.train.eval_rows > 0 and not cfg.data.is_synthetic
    return cfg.train.loss is Loss.next_token or evaluates


def uses_fully_shard(parallel: ParallelConfig, sizes: MeshSizes) -> bool:
    """Whether `fully_shard` is applied. Over one shard, and without offloading, it would only copy each weight and
    gradient in each micro-batch.
    """
    return sizes.shards > 1 or parallel.fsdp.cpu_offload


def has_master_weights(cfg: Config, sizes: MeshSizes) -> bool:
    """Whether a bfloat16 model has float32 master weights. Where `fully_shard` is applied, it keeps them itself."""
    mixed = cfg.train.dtype is Dtype.bfloat16 and cfg.train.weights is WeightDtype.float32
    return mixed and not uses_fully_shard(cfg.parallel, sizes)


def _check_name(cfg: Config) -> None:
    if {"", ".", ".."} & set(cfg.name.split("/")):
        why, legal = "a folder below outputs/ is named by it", "a word such as train, or words with / between"
        raise ConfigError("name", cfg.name, why, legal)


def _check_betas(cfg: Config) -> None:
    if len(cfg.optimizer.betas) != 2:
        legal = "two numbers from 0 to below 1, such as [0.9,0.95]"
        raise ConfigError("optimizer.betas", cfg.optimizer.betas, "not AdamW's two", legal)


def _check_optimizer_options(cfg: Config) -> None:
    for owner, keys in OPTIMIZER_OPTIONS.items():
        for key in keys:
            value = attrgetter(key)(cfg)
            if value and cfg.optimizer.name is not owner:
                title = "AdamW" if owner is OptimizerName.adamw else "SGD"
                # A resumed run repeats what it was started with.
                fix = {key: 0 if key == "optimizer.momentum" else None}
                raise ConfigError(key, value, f"an option of {title}'s", f"optimizer={owner}", fix=fix)


def _check_budget(cfg: Config) -> None:
    steps, tokens = cfg.train.steps, cfg.train.tokens
    if steps is not None and tokens is not None:
        why, legal = f"train.steps={steps} is a budget too", "one of the two, the other null"
        raise ConfigError("train.tokens", tokens, why, legal, fix={"train.steps": "null"})
    if steps is None and tokens is None:
        why, legal = "the run has no budget", "train.steps or train.tokens"
        raise ConfigError("train.steps", None, why, legal, fix={"train.steps": 100})


def _check_vocabulary(cfg: Config) -> None:
    size = cfg.model.args.get("vocab_size")
    if isinstance(size, int) and size < cfg.tokenizer.vocab_size:
        if cfg.init_from:
            key, value, right = "tokenizer.path", cfg.tokenizer.path, "VALUE"
            if cfg.tokenizer.kind is TokenizerKind.bpe:
                key, value, right = "tokenizer.vocab_size", cfg.tokenizer.vocab_size, size
            why = f"{cfg.tokenizer.vocab_size} entries, and the embedding of {cfg.init_from} has {size}"
            raise ConfigError(key, value, why, f"a tokenizer of at most {size}", fix={key: right})
        why = f"the tokenizer has {cfg.tokenizer.vocab_size} entries"
        legal = "at least as many; by default it follows the tokenizer"
        raise ConfigError("model.vocab_size", size, why, legal)


def _check_length(cfg: Config) -> None:
    longest = cfg.model.args.get("max_seq_len")
    if isinstance(longest, int) and longest < cfg.data.seq_len:
        if cfg.init_from:
            why, legal = f"a row of {cfg.init_from} has at most {longest} tokens", f"up to {longest}"
            raise ConfigError("data.seq_len", cfg.data.seq_len, why, legal, fix={"data.seq_len": longest})
        why = f"rows have data.seq_len={cfg.data.seq_len} tokens"
        legal = "at least as many; by default it follows data.seq_len"
        raise ConfigError("model.max_seq_len", longest, why, legal)


def _check_checkpoints(cfg: Config) -> None:
    background = cfg.checkpoint.background
    if not isinstance(background, bool) and background != "auto":
        raise ConfigError("checkpoint.background", background, "no such choice", "true, false or auto")
    every, for_ever = cfg.checkpoint.every, cfg.checkpoint.keep_every
    if for_ever is not None and (every is None or for_ever % every):
        why = f"with checkpoint.every={format_value(every)} not every one of these steps has a checkpoint"
        legal = f"a multiple of {every}" if every else "null, or a checkpoint.every that divides it"
        fix = {"checkpoint.keep_every": -(-for_ever // every) * every if every else None}
        raise ConfigError("checkpoint.keep_every", for_ever, why, legal, fix=fix)


def _check_plan_options(cfg: Config, sizes: MeshSizes) -> None:
    parallel = cfg.parallel
    if parallel.async_tp and not (parallel.tensor and sizes.tp > 1):
        why, legal = "there is no tensor parallelism to overlap with", "a plan with mesh.tp above 1"
        raise ConfigError("parallel.async_tp", True, why, legal)
    if parallel.async_tp and not parallel.compile:
        why, legal = "async TP requires parallel.compile=true", "parallel.compile=true"
        raise ConfigError("parallel.async_tp", True, why, legal, fix={"parallel.compile": "true"})
    if parallel.activation_checkpointing is Checkpointing.budget and not parallel.compile:
        why = "the compiler chooses what to recompute, but parallel.compile=false"
        legal = "parallel.compile=true, or none, selective or full"
        fix = {"parallel.compile": "true"}
        raise ConfigError("parallel.activation_checkpointing", "budget", why, legal, fix=fix)
    if parallel.gradient_accumulation_fusion:
        _check_fusion(cfg, sizes)
    if cfg.optimizer.split_masters and not has_master_weights(cfg, sizes):
        raise _no_masters_to_split(cfg)
    if not cfg.model.blocks:
        why = f"it works block by block, and model {cfg.model.name} has none"
        kind = parallel.activation_checkpointing
        if parallel.compile:
            fix = {"parallel.compile": "false"}
            raise ConfigError("parallel.compile", True, why, "false, or model.blocks", fix=fix)
        if kind is not Checkpointing.none:
            key = "parallel.activation_checkpointing"
            raise ConfigError(key, kind, why, "none, or model.blocks", fix={key: "none"})


def _check_profiler(cfg: Config) -> None:
    last = cfg.profiler.first_step + cfg.profiler.steps - 1
    if cfg.profiler.name is ProfilerName.trace and last > total_steps(cfg):
        why = f"the run ends after step {total_steps(cfg)}, and step {last} would be the last profiled"
        legal = "an earlier one from 3 on, or more train.steps"
        more: dict[str, object] = {"profiler.first_step": None, "train.steps": last}
        raise ConfigError("profiler.first_step", cfg.profiler.first_step, why, legal, fix=more)
    if cfg.profiler.memory and cfg.profiler.name is ProfilerName.none:
        why = "the snapshot covers the profiled steps, but profiler=none"
        raise ConfigError("profiler.memory", True, why, "profiler=memory", fix={"profiler": "memory"})


def _check_precision(cfg: Config) -> None:
    legal, fix = "train.dtype=bfloat16", {"train.dtype": "bfloat16"}
    if cfg.train.weights is WeightDtype.bfloat16 and cfg.train.dtype is not Dtype.bfloat16:
        why = f"train.dtype={cfg.train.dtype} computes on wider numbers than that"
        raise ConfigError("train.weights", "bfloat16", why, legal, fix=fix)
    if cfg.train.float8 is not Float8.none and cfg.train.dtype is not Dtype.bfloat16:
        why = f"what surrounds its matmuls is bfloat16, and train.dtype={cfg.train.dtype}"
        raise ConfigError("train.float8", cfg.train.float8, why, legal, fix=fix)
    if cfg.train.float8_emulated and cfg.train.float8 is Float8.none:
        why = "train.float8=none leaves nothing to emulate"
        raise ConfigError("train.float8_emulated", True, why, "false, or train.float8=tensorwise or rowwise")
    if cfg.parallel.fsdp.reduce_dtype is Dtype.float64 and cfg.train.dtype is Dtype.bfloat16:
        why, legal = "wider than the float32 gradients", "float32 or bfloat16"
        raise ConfigError("parallel.fsdp.reduce_dtype", "float64", why, legal)


def _check_fusion(cfg: Config, sizes: MeshSizes) -> None:
    """Matmuls can add to gradients that are whole on their rank, of more than one micro-batch."""
    if sizes.world > 1 or cfg.parallel.fsdp.cpu_offload:
        why, instead = "gradients are sharded, summed over ranks or offloaded", "parallel=none on one rank"
    elif cfg.train.float8 is not Float8.none:
        why, instead = "a float8 matmul of torchao's adds to nothing", "train.float8=none"
    elif not cfg.plan_only and micro_batches(cfg, sizes) == 1:
        why, instead = "a step has one micro-batch", "a smaller train.micro_batch_size"
    else:
        return
    key = "parallel.gradient_accumulation_fusion"
    raise ConfigError(key, True, why, f"false, or {instead}", fix={key: "false"})


def _no_masters_to_split(cfg: Config) -> ConfigError:
    if cfg.train.dtype is not Dtype.bfloat16:
        why, instead = (
            f"train.dtype={cfg.train.dtype} computes with the weights themselves",
            "train.dtype=bfloat16",
        )
    elif cfg.train.weights is WeightDtype.bfloat16:
        why, instead = "train.weights=bfloat16 leaves no master weights", "train.weights=float32"
    else:
        why, instead = (
            "fully_shard keeps float32 weights itself",
            "a plan without it, such as none, tp or ddp",
        )
    key = "optimizer.split_masters"
    return ConfigError(key, True, why, f"false, or {instead}", fix={key: "false"})


def _check_batch(cfg: Config, sizes: MeshSizes) -> None:
    batch, micro = cfg.train.global_batch_size, cfg.train.micro_batch_size
    if batch % sizes.dp:
        below = batch // sizes.dp * sizes.dp
        why, legal = f"does not split over {sizes.dp} data-parallel ranks", f"a multiple of {sizes.dp}"
        fix = {"train.global_batch_size": below or sizes.dp}
        raise ConfigError("train.global_batch_size", batch, why, legal, fix=fix)
    share = batch // sizes.dp
    if micro is not None and share % micro:
        fits = next(m for m in range(min(micro, share), 0, -1) if share % m == 0)
        why, legal = f"does not divide the {share} rows of each data-parallel rank", f"a divisor of {share}"
        raise ConfigError("train.micro_batch_size", micro, why, legal, fix={"train.micro_batch_size": fits})
