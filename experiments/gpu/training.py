"""Steps of the real loop in many settings, on the weights of one model: tokens per second, memory, and a profile.

Between two settings only the blocks' forward is wrapped again, and the step's setup replaced; weights and moments stay.
"""

from __future__ import annotations

import csv
import dataclasses
import gc
import json
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from gpu.rows import Stage, card_now

import tpresearch
from tpresearch.config import Config
from tpresearch.config.world import World
from tpresearch.data.pipeline import prepare
from tpresearch.parallel.apply import wrap_forward
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.train.assemble import assemble
from tpresearch.train.loop import Loop
from tpresearch.train.losses import build_objective
from tpresearch.train.observe import Observers
from tpresearch.train.preflight import preflight
from tpresearch.train.profile import Profiler
from tpresearch.train.speed import Speed
from tpresearch.train.state import TrainState

WARM_UP, TIMED = 2, 4
"""Steps; of the rehearsal, one and two."""
SETTING_S = 30
"""Seconds that a setting takes, its compilation with it: none begins with fewer left (H200, Llama-3-8B, with two steps more: 28 to 39)."""
PROFILED = (
    *("8b none mb4", "8b fused sums none mb4", "8b fused sums selective mb1"),
    "8b split masters fused sums none mb2",
)
"""Names of the settings whose kernels are kept, in two more steps."""
TUNED = "tuned"
"""Ends the name of a setting whose fused kernels inductor tunes by trying."""
STAGED = "staged"
"""Ends the name of a setting in which kernels that reduce rows and columns, as a norm's backward does, load the next row while they reduce
one: inductor's default from torch 2.14 on, and an option before (private; read in 2.11 and 2.14)."""
COMMON = (
    *(
        "parallel=none",
        "data=random_tokens",
        "train.dtype=bfloat16",
        "train.steps=100000",
        "train.eval_rows=0",
    ),
    *("logger=none", "schedule=constant", "optimizer.lr=1e-5"),
)
FULL = (*COMMON, "data.seq_len=4096", "train.global_batch_size=8")
LLAMA3_8B = (
    *("model=llama2_7b", "model.n_kv_heads=8", "model.ffn_dim=14336", "tokenizer.vocab_size=128256", *FULL),
)
COMPILED_ADAMW = ("optimizer.compile=true",)
FUSED_SUMS = ("parallel.gradient_accumulation_fusion=true",)
"""Of a family that has them the first setting must be one."""
SPLIT_MASTERS = (*COMPILED_ADAMW, "optimizer.moment_dtype=bfloat16", "optimizer.split_masters=true")
FITS_80 = ("train.loss_chunk=2048",)
LLAMA2_7B = ("model=llama2_7b", "tokenizer.vocab_size=32000", *FULL)
TINY = (
    "model=llama2_debug",
    "tokenizer.vocab_size=260",
    *COMMON,
    "data.seq_len=16",
    "train.global_batch_size=8",
)
KEPT = ("train.weights", "optimizer.split_masters", "parallel.gradient_accumulation_fusion")
"""Of a family's overrides, in the rehearsal."""


def setting(kind: str, micro: int, compile: bool = True) -> tuple[str, ...]:
    compiled = f"parallel.compile={str(compile).lower()}"
    return f"parallel.activation_checkpointing={kind}", f"train.micro_batch_size={micro}", compiled


FAMILIES: dict[str, tuple[tuple[str, ...], dict[str, tuple[str, ...]]]] = {
    "8b": (
        (*LLAMA3_8B, "train.weights=bfloat16"),
        {
            "8b none mb4": setting("none", 4),
            "8b selective mb4": setting("selective", 4),
            "8b selective mb2": setting("selective", 2),
            "8b full mb2": setting("full", 2),
            "8b eager selective mb2": setting("selective", 2, compile=False),
            "8b full mb8": setting("full", 8),
            "8b selective mb8": setting("selective", 8),
            "8b full mb4": setting("full", 4),  # this and the next fit 80 GB
            "8b selective mb1": setting("selective", 1),
            f"8b none mb4 {TUNED}": setting("none", 4),  # last: the search took more than a minute
        },
    ),
    "8b-float8": (
        (*LLAMA3_8B, "train.weights=bfloat16", "train.float8=tensorwise", "train.loss_chunk=8192"),
        {"8b float8 selective mb4": setting("selective", 4), "8b float8 none mb2": setting("none", 2)},
    ),
    "8b-float8-rowwise": (
        (*LLAMA3_8B, "train.weights=bfloat16", "train.float8=rowwise", "train.loss_chunk=8192"),
        {"8b float8 rowwise selective mb4": setting("selective", 4)},
    ),
    "8b-compiled-adamw": (
        (*LLAMA3_8B, *COMPILED_ADAMW, "train.weights=bfloat16", "train.loss_chunk=4096"),
        {
            "8b fused sums none mb4": (*setting("none", 4), *FUSED_SUMS),
            f"8b fused sums none mb4 {STAGED}": (*setting("none", 4), *FUSED_SUMS),
            "8b compiled AdamW none mb4": setting("none", 4),
            "8b fused sums selective mb1": (*setting("selective", 1), *FUSED_SUMS, *FITS_80),
            "8b compiled AdamW selective mb1": (*setting("selective", 1), *FITS_80),
            "8b fused sums selective mb1 chunk4096": (*setting("selective", 1), *FUSED_SUMS),
            f"8b compiled AdamW none mb4 {TUNED}": setting("none", 4),
            f"8b compiled AdamW selective mb1 {TUNED}": (*setting("selective", 1), *FITS_80),
        },
    ),
    "7b-masters": (LLAMA2_7B, {"7b float32 masters full mb2": setting("full", 2)}),
    "8b-masters": (
        (*LLAMA3_8B, *COMPILED_ADAMW, "optimizer.moment_dtype=bfloat16"),
        {
            "8b float32 masters fused sums selective mb2 chunk4096": (
                *setting("selective", 2),
                *FUSED_SUMS,
                "train.loss_chunk=4096",
            ),
            "8b float32 masters fused sums selective mb2 chunk8192": (
                *setting("selective", 2),
                *FUSED_SUMS,
                "train.loss_chunk=8192",
            ),
            "8b float32 masters fused sums selective mb2": (*setting("selective", 2), *FUSED_SUMS),
            "8b float32 masters bfloat16 moments selective mb2": setting("selective", 2),
        },
    ),
    "8b-split-masters": (
        (*LLAMA3_8B, *SPLIT_MASTERS, *FUSED_SUMS),
        {
            "8b split masters fused sums none mb2": (*setting("none", 2), "train.loss_chunk=8192"),
            f"8b split masters fused sums none mb2 {STAGED}": (*setting("none", 2), "train.loss_chunk=8192"),
            "8b split masters fused sums selective mb4": (*setting("selective", 4), "train.loss_chunk=2048"),
        },
    ),
    "7b": (
        (*LLAMA2_7B, *COMPILED_ADAMW, "train.weights=bfloat16", "train.loss_chunk=8192"),
        {"7b none mb4": setting("none", 4), "7b selective mb4": setting("selective", 4)},
    ),
}
"""By stage: the model, and its settings in the order of their worth."""


def main() -> None:
    words = Stage.from_arguments("")[1]
    family = words[0]
    stage, _ = Stage.from_arguments(f"training-{family}")
    overrides, settings = FAMILIES[family]
    if stage.tiny:
        kept = [word for word in overrides if word.startswith(KEPT)]
        overrides = (*TINY, *kept)
        settings = {
            name: (*words[:2], "parallel.compile=false", *(w for w in words if w in FUSED_SUMS))
            for name, words in (*list(settings.items())[:1], *list(settings.items())[-1:])
        }
    cfgs = {
        name: tpresearch.load(*overrides, f"device={stage.device.type}", *words)
        for name, words in settings.items()
    }
    measure(stage, cfgs)


def measure(stage: Stage, cfgs: dict[str, Config]) -> None:
    first = next(iter(cfgs.values()))
    job = preflight(first, World())
    assert job.device
    speed = Speed.of(job.model, job.plan, first, job.device)
    with process_group(job.device, World()):
        mesh, rows = build_mesh(job.sizes, stage.device.type), prepare(first.data, first.tokenizer)
        loop = assemble(job, mesh, job.device, rows, restore=draw_on_device)
        sums = loop.state.sums
        stage.wait()
        stage.add(event="weights drawn", parameters=job.parameters, card=job.device.name)
        for name, cfg in cfgs.items():
            if stage.left() < (SETTING_S if stage.on_cuda else 0):
                stage.add(event="no time left", id=name)
                break
            if too_large(name, stage):
                stage.add(event="does not fit this card", id=name)
                continue
            tune_kernels(name.endswith(TUNED))
            load_ahead(name.endswith(STAGED))
            loop.state.sums = sums if cfg.parallel.gradient_accumulation_fusion else None
            row = None
            try:
                row = steps(loop, name, cfg, stage)
            except Exception as error:  # of one setting: the others may run
                kind = "out of memory" if isinstance(error, torch.OutOfMemoryError) else type(error).__name__
                stage.add(id=name, error=kind, said=str(error)[:300])
            if row is None:
                # Only here: as long as there is the error, there are the tensors of each frame that it passed.
                recover(loop)
                continue
            row |= speed.metrics(row["step_s"])
            stage.add(id=name, overrides=wrapping(cfg), **row)
            if name in PROFILED:
                profile(loop, cfg, stage, name)


def load_ahead(on: bool) -> None:
    """See STAGED."""
    if torch.__version__ < "2.14":
        torch._inductor.config.triton.mix_order_reduction_allow_multi_stages = on


def tune_kernels(on: bool) -> None:
    """More candidates for each fused kernel, of which inductor takes the fastest (private; read in torch 2.11 to 2.14).

    Coordinate descent, which searches further, took over a minute.
    """
    torch._inductor.config.max_autotune_pointwise = on
    torch._inductor.config.triton.mix_order_reduction_autotune_split_size = on


def too_large(name: str, stage: Stage) -> bool:
    """Whether the predicted peak is clearly above the card's memory: to see that takes the time of a compilation."""
    if not stage.on_cuda:
        return False
    limit = 1.02 * torch.cuda.get_device_properties(0).total_memory
    with (Path(__file__).parent / "predictions.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["what"] == "peak memory"]
    return any(float(row["h200"]) * 1e9 > limit for row in rows if name.startswith(row["id"]))


@torch.no_grad()
def draw_on_device(state: TrainState) -> None:
    """Weights of the usual spread at once: drawn as a run draws them, those of 8B take half a minute of the lease."""
    with state.weights() as weights:
        for weight in weights.values():
            weight.normal_(std=0.02) if weight.dim() > 1 else weight.fill_(1)


def wrapping(cfg: Config) -> dict[str, Any]:
    """What a setting is, in the result's row."""
    return {
        "activation_checkpointing": str(cfg.parallel.activation_checkpointing),
        "micro_batch_size": cfg.train.micro_batch_size,
        "compile": cfg.parallel.compile,
        "gradient_accumulation_fusion": cfg.parallel.gradient_accumulation_fusion,
        "weights": str(cfg.train.weight_dtype),
        "loss_chunk": cfg.train.loss_chunk,
    }


def steps(loop: Loop, name: str, cfg: Config, stage: Stage) -> dict[str, Any]:
    """Seconds of each step, a row each as soon as it is taken, and what the allocator has seen."""
    prepare_for(loop, cfg)
    if stage.on_cuda:
        torch.cuda.reset_peak_memory_stats()
    taken, losses = [], []
    warm_up, count = (1, 2) if stage.tiny else (WARM_UP, TIMED)
    for _ in range(warm_up + count):
        stage.wait()
        began = time.perf_counter()
        result = loop.step()
        stage.wait()
        taken.append(time.perf_counter() - began)
        losses.append(result.loss.item())
        stage.add(event="step", id=name, seconds=taken[-1], loss=losses[-1])
    timed = taken[warm_up:]
    row: dict[str, Any] = {
        "first_step_s": taken[0],
        "step_s": statistics.median(timed),
        "steps_s": timed,
        "losses": losses,
    }
    if stage.on_cuda:
        stats = torch.cuda.memory_stats()
        row |= {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "alloc_retries": stats["num_alloc_retries"],
            "nvidia_smi": card_now(),
        }
    return row


def prepare_for(loop: Loop, cfg: Config) -> None:
    setup = loop.setup
    torch._dynamo.reset()
    for name in setup.plan.blocks:
        block = loop.state.model.get_submodule(name)
        block.__dict__.pop("forward", None)
        block._forward_pre_hooks.clear()
        wrap_forward(block, cfg.parallel, bool(setup.plan.rules))
    loop.setup = dataclasses.replace(
        setup, cfg=cfg, objective=build_objective(cfg, setup.plan), observers=Observers()
    )


def recover(loop: Loop) -> None:
    loop.state.optimizer.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()


def profile(loop: Loop, cfg: Config, stage: Stage, name: str) -> None:
    """Two more steps of the setting that the loop is in."""
    cfg.profiler.first_step, cfg.profiler.steps = 1, 2
    with TemporaryDirectory() as folder:
        observers = Observers([Profiler(cfg.profiler, Path(folder), 0, stage.on_cuda)])
        loop.setup = dataclasses.replace(loop.setup, observers=observers)
        for _ in range(2):
            loop.step()
        found = json.loads((Path(folder) / "kernels-rank0.json").read_text())
    stage.add(event="profile", id=name, classes=found["classes"], slowest=found["slowest"])


if __name__ == "__main__":
    main()
