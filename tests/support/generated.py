"""Configs made by chance from every key and group of the schema, right ones and wrong ones: a case is a function of its number."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import Any

from support.commands import Done
from tpresearch.config.schema import ComposedConfig
from tpresearch.launch.composition import conf_dir

NO_FOLDER = "hydra.run.dir=/dev/null/x"
"""Where no run can lie: the last thing that a start refuses, so that nothing is trained."""

MOST_S = 5
"""Seconds of processor time that a plan, or a refusal, may take."""

MODELS = {
    "llama2_debug": ("layers.*.attention", "output", "n_heads", "n_kv_heads", "n_layers", "dim", "ffn_dim"),
    "toy_mlp": ("mlp", "embed", "dim", "hidden_dim", "vocab_size", "dim", "dim"),
    "llama2_tiny": ("norm", "layers.*", "n_heads", "max_seq_len", "tied", "dim", "ffn_dim"),
}
"""Modules and settings to choose from."""
RULES = {
    "llama2_debug": ("embed", "attn_in", "qkv", "out", "ffn_x", "ffn_in", "ffn_out", "logits", "norms", "norm"),
    "llama2_tiny": ("embed", "attn_in", "qkv", "out", "ffn_x", "ffn_in", "ffn_out", "logits", "norms", "norm"),
    "toy_mlp": ("embed", "in_proj", "out_proj", "output"),
}  # fmt: skip
LAYOUTS = (
    *("replicate", "shard:0", "shard:1", "shard:-1", "shard:2", "logits", "batch", "null", "[replicate]"),
    *("[shard:1]", "[replicate,null]", "[shard:1,null]", "[null]", "[]"),
)
HOSTILE = (
    *("null", "-1", "0", "1", "1.5", "-0.5", "1e400", "nan", "inf", "-inf", "99999999999999999999", "1000000000000"),
    *("true", "abc", "''", '" "', "a,b", "[]", "[null]", "[1,[2]]", "[a,b]", "{}", "{a:1}", "{a:{b:[c]}}", "???", "~"),
    *("${name}", "${nowhere}", "${when:1}", "'${'", "shard:99", "shard:99999999999999999999", "../../up", "/dev/null"),
    *("é", "'[/b]'", "'<b>'", '"\\t"', "'a\\'b'", "a b", "glob(*)", "range(1,3)", "choice(1,2)", "int(3)", "{", "[", "'"),
    "x" * 300,
)  # fmt: skip
RANKS = (1, 1, 2, 2, 3, 4, 4, 5, 6, 8, 16, 64, 512)
HYDRA = ("run.dir", "job.chdir", "job.name", "searchpath", "output_subdir", "verbose", "mode", "sweep.dir")
FLAGS = ("--steps", "-x", "--config-name=trane", "--config-dir=nowhere", "--multirun=3")


@dataclass(frozen=True)
class Case:
    words: tuple[str, ...]
    ranks: int = 1
    """As the first rank of so many."""
    trains: bool = False


def case(number: int) -> Case:
    """Three of four are only planned, one in sixteen trains two steps, the others are judged up to their folder."""
    draw = Random(number)
    kind = draw.randrange(16)
    if kind == 0:
        return Case((*_small("toy_mlp"), "parallel=none", *_of_a_training(draw)), trains=True)
    model = draw.choice(("llama2_debug", "llama2_debug", "toy_mlp", "toy_mlp", "llama2_tiny"))
    ranks = draw.choice(RANKS)
    plan = draw.choice(_options("parallel"))
    wrong = [_wrong(draw, model) for _ in range(draw.choice((0, 1, 1, 1, 1, 2)))]
    right = [_right(draw) for _ in range(draw.choice((0, 0, 1, 2)))]
    words = [*_small(model), f"parallel={plan}", *right, *wrong]
    if kind < 4:
        return Case((*words, NO_FOLDER), min(ranks, 8))
    return Case((*words, "plan_only=true", *([f"world_size={ranks}"] if ranks > 1 else [])))


def fault(case: Case, done: Done, left: list[Path]) -> str | None:
    """What a command did that none may; None where it worked, or was refused as promised."""
    lines = done.err.splitlines()
    if (
        case.trains
        and done.code == 1
        and re.search(r"error  NonfiniteError: train/loss is (nan|inf) at step 2; ", done.out)
    ):
        return None  # it began, and says how it failed
    if "Traceback" in done.err:
        return f"traceback: {lines[-1]}"
    if done.cpu_seconds > MOST_S and not case.trains:
        return f"{done.cpu_seconds:.1f} s of processor time"
    if done.code == 0:
        return (
            "no plan is printed" if "plan_only=true" in case.words and "placement" not in done.out else None
        )
    if left:
        return f"left behind: {left[0]}"
    out = "" if any(word.startswith("hydra.verbose=") for word in case.words) else done.out  # Hydra's own log
    if done.code != 2 or out or len(lines) != 1 or not lines[0].startswith("error: "):
        return f"exit code {done.code}, {len(lines)} lines on stderr, the first {lines[:1]}, stdout {done.out[:80]!r}"
    about_code = lines[0].startswith("error: model=")
    return None if "; try: " in lines[0] or about_code else f"nothing to try: {lines[0]}"


def to_try(done: Done) -> Case | None:
    """What a refusal proposes, up to its folder; None where that cannot be tried: a sweep, or a value to be filled in."""
    words = done.command_to_try
    starts = next((place for place, word in enumerate(words) if word.endswith("train.py")), None)
    if starts is None:
        return None
    before, typed = words[:starts], words[starts + 1 :]
    if {"-m", "--multirun"} & set(typed) or any(
        re.search(r"(VALUE|<\w+>|MULTIRUN)$", word) for word in typed
    ):
        return None
    named = [int(word.partition("=")[2]) for word in before if word.startswith("--nproc-per-node=")]
    (ranks,) = named or [1]
    return Case((*typed, NO_FOLDER), ranks)


def refused(done: Done) -> str | None:
    """For what a command that was proposed is refused, but for the folder that was asked to be impossible."""
    planned = done.code == 0
    return (
        None if planned or done.err.startswith(f"error: {NO_FOLDER}: cannot be written") else done.err[:300]
    )


def _small(model: str) -> tuple[str, ...]:
    return (
        *(f"model={model}", "data=random_tokens", "tokenizer.vocab_size=300", "data.seq_len=16"),
        *("train.steps=2", "train.eval_rows=0", "logger=none"),
    )


def _options(group: str) -> list[str]:
    return sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))


def _keys(kind: type = ComposedConfig, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key of the schema and its type hint."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _keys(hint, f"{prefix}{field.name}.")
        elif field.name not in ("model", "cluster"):
            yield f"{prefix}{field.name}", hint


KEYS = dict(_keys())
GROUPS = (
    "model",
    "parallel",
    "mesh",
    "data",
    "tokenizer",
    "optimizer",
    "schedule",
    "logger",
    "experiment",
    "checkpoint",
)


def _right(draw: Random) -> str:
    """A value that its key may have, though not in every company."""
    key = draw.choice([key for key in KEYS if key not in ("plan_only", "world_size", "resume", "init_from")])
    kinds = [kind for kind in typing.get_args(KEYS[key]) if isinstance(kind, type)] or [KEYS[key]]
    kind = draw.choice(kinds)
    if kind is type(None):
        return f"{key}=null"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return f"{key}={draw.choice(list(kind))}"
    if kind is bool:
        return f"{key}={draw.choice(('true', 'false'))}"
    if kind is int:
        return f"{key}={draw.choice((1, 2, 3, 4, 8, 12, 16, 24, 300, 1000))}"
    if kind is float:
        return f"{key}={draw.choice((0, 1e-3, 0.1, 0.5, 1, 10))}"
    return f"{key}={draw.choice(('abc', 'a_b', '[abc]', '[0.5,0.9]', '[]'))}"


def _wrong(draw: Random, model: str) -> str:
    """A word that is most likely wrong: a value, a key, an option, a setting of the model, a rule, or a flag."""
    first, second, *settings = MODELS[model]
    hostile = draw.choice(HOSTILE)
    plan, rule = draw.choice(("tp", "sp")), draw.choice(RULES[model])
    key = draw.choice(list(KEYS))
    of_rule = draw.choice(("match", "style", "src", "dst", "axis", "units", "_target_", "stile"))
    value = {
        "match": draw.choice((first, second, ".", "*", "**", "[", "layers.*.*", hostile)),
        "style": draw.choice(("colwise", "rowwise", "sequence", "input", "output", hostile)),
        "units": draw.choice((f"[{draw.choice(settings)}]", "[n_layers]", hostile)),
        "axis": draw.choice(("tp", "dp_shard", "cp", hostile)),
        "_target_": draw.choice(("torch.nn.Linear", "nowhere.Mine", hostile)),
    }.get(of_rule, draw.choice((*LAYOUTS, hostile)))
    return draw.choice(
        (
            f"{key}={hostile}",
            f"{key}={hostile}",
            f"{draw.choice(('+', '++', '~'))}{key}={hostile}",
            f"{_misspelt(draw, key)}={hostile}",
            f"{draw.choice(GROUPS)}={draw.choice((hostile, 'nothing', 'tp4'))}",
            f"mesh.{draw.choice(('tp', 'dp_shard', 'dp_replicate'))}={draw.choice((-1, 0, 2, 3, 4, 7, 8, 64, 10**6))}",
            f"model.{draw.choice(settings)}={draw.choice((hostile, '-3', '0', '7', '96', '1000000'))}",
            f"+model.{draw.choice(('foo', 'norm_eps', 'rope_theta', 'name', 'plans.mine', 'blocks.x'))}={hostile}",
            f"model.{draw.choice(('blocks', 'plans', 'name', '_target_', f'plans.{plan}', f'plans.{plan}.{rule}'))}={hostile}",
            f"++model.plans.{plan}.{rule}.{of_rule}={value}",
            f"++model.plans.{plan}.{rule}.{of_rule}={value}",
            f"hydra.{draw.choice(HYDRA)}={hostile}",
            draw.choice((*FLAGS, hostile, "=", f"{key}", f"~{key}")),
        )
    )


def _misspelt(draw: Random, key: str) -> str:
    place = draw.randrange(len(key))
    return draw.choice(
        (key[:place] + key[place + 1 :], key + "s", key.rpartition(".")[2], f"{key}.x", key.upper())
    )


def _of_a_training(draw: Random) -> list[str]:
    """What a run of two steps may be told, by which none should break."""
    chosen = draw.sample(
        [
            *("optimizer=sgd", "optimizer.lr=10", "optimizer.lr=1e30", "optimizer.momentum=0.9", "optimizer.eps=1e-30"),
            *("schedule=wsd", "schedule=constant", "schedule.warmup_steps=0", "schedule.warmup_steps=1000"),
            *("train.dtype=float64", "train.dtype=bfloat16", "train.weights=bfloat16", "train.micro_batch_size=3"),
            *("train.clip_grad_norm=null", "train.clip_grad_norm=1e-30", "train.on_nonfinite=skip", "train.seed=123456789012"),
            *("train.log_every=3", "train.log_every=1000000", "train.eval_every=1", "train.warmup_log_steps=0"),
            *("data.seq_len=1", "train.global_batch_size=1", "tokenizer.vocab_size=2", "model.dim=1", "model.hidden_dim=1"),
            *("defects.keep_gradients=true", "defects.weights_per_rank=true", "defects.overlapping_batches=true"),
            *("checkpoint=every", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.background=true"),
            *("parallel=ddp", "parallel=fsdp", "parallel=tp", "parallel=fsdp_tp", "parallel=hsdp_tp", "device=cpu"),
            *("parallel.activation_checkpointing=full", "parallel.fsdp.cpu_offload=true", "parallel.loss_parallel=false"),
            *("name='[/b]'", "name=é", "name=a/b", "hydra.run.dir=given", "hydra.job.chdir=true", "model.blocks=[]"),
        ],
        draw.randrange(1, 5),
    )  # fmt: skip
    return list({word.partition("=")[0]: word for word in chosen}.values())
