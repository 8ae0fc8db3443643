"""Our step beside those of Fabric, of transformers with accelerate, and of a loop in plain torch, on one GPU in one process.

    python experiments/peers/one_gpu.py --out OUT --device cuda --limit 115 [eager] [compiled]
    python experiments/peers/one_gpu.py --out OUT --device cpu --tiny --limit 60          the rehearsal

The same Llama in bfloat16 throughout, initial weights, batches, fused AdamW and clipping, without parallelism, in turns: eager,
then compiled as each one's users do it. Rows are appended to OUT/results.jsonl as they come, and an error ends its contender alone.
"""

from __future__ import annotations

import gc
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1])]
from gpu.rows import Stage, card_now
from peers.turns import adamw_of, as_hugging_face, our_steps, version

import tpresearch
from tpresearch.config.validate import tokens_per_step
from tpresearch.config.world import World
from tpresearch.data.batches import Batches
from tpresearch.data.pipeline import prepare
from tpresearch.data.rows import AnyCorpus
from tpresearch.launch import Run
from tpresearch.parallel.group import process_group
from tpresearch.parallel.mesh import build_mesh
from tpresearch.plan.meta import settings_with_defaults
from tpresearch.train.assemble import assemble
from tpresearch.train.main import build_observers
from tpresearch.train.preflight import Preflight, preflight
from tpresearch.train.state import TrainState

HERE = Path(__file__).parent
WARM_UP, BLOCK, TURNS = 3, 2, 8
"""Steps of each before anything is timed, and before it is the next one's turn; turns of each."""
WIDE_CHUNK = 4096
"""Tokens in a chunk of the loss, instead of 2,048: the matmul for hidden states then fills 2.9 instead of 1.5 times a Hopper GPU's 132
multiprocessors."""
EAGER_SHARE = 0.35
"""Of the time, at most, for eager steps: compiling takes longer."""
TURNS_S = 8
"""Seconds that are kept for turns: with fewer left after it, no further contender is built."""
FIRST_TOLERANCE, TOLERANCE = 2e-3, 2e-2
"""Relative differences of the first loss and of later ones that bfloat16 explains."""
COMMON = (
    *("parallel=none", "data=random_tokens", "logger=none", "train.steps=100000", "train.eval_rows=0"),
    *("train.dtype=bfloat16", "train.weights=bfloat16", "train.eval_every=null", "optimizer.lr=1e-4"),
    *("optimizer.weight_decay=0", "schedule=constant", "schedule.warmup_steps=0", "train.clip_grad_norm=1"),
)
FULL = (
    *("model=llama2_7b", "model.dim=3072", "model.n_layers=8", "model.n_heads=24", "model.n_kv_heads=24"),
    *("model.ffn_dim=8192", "tokenizer.vocab_size=32000", "data.seq_len=2048", "train.global_batch_size=8"),
)
TINY = (*("model=llama2_debug", "tokenizer.vocab_size=260", "data.seq_len=16"), "train.global_batch_size=8")
Make = Callable[[], Iterator[float]]


@dataclass
class Contender:
    name: str
    steps: Iterator[float]
    """Each trains once more and is the loss."""
    losses: list[float]
    """Of all steps."""
    held_bytes: int
    """Allocated between its steps: weights, moments, and what its script keeps."""
    seconds: list[float] = field(default_factory=list)
    """Per step, a number per turn."""
    step_bytes: int = 0
    """Allocated on top of that within a step, at most."""

    def take_turn(self, stage: Stage) -> None:
        before = reset_peak(stage)
        stage.wait()
        began = time.perf_counter()
        losses = [next(self.steps) for _ in range(BLOCK)]
        stage.wait()
        self.seconds.append((time.perf_counter() - began) / BLOCK)
        self.losses += losses
        if stage.on_cuda:
            self.step_bytes = max(self.step_bytes, torch.cuda.max_memory_allocated() - before)


def main() -> None:
    stage, words = Stage.from_arguments("peers")
    stage.out.mkdir(parents=True, exist_ok=True)
    modes = words or ["eager", "compiled"][: 1 if stage.tiny else 2]  # the compiler takes a minute
    first = job_of(modes[0], stage)
    assert first.device
    sizes = {"parameters": first.parameters, "rows": first.cfg.train.global_batch_size}
    sizes |= {"seq_len": first.cfg.data.seq_len, "model": dict(first.cfg.model.args)}
    stage.add(event="peers", card=first.device.name, torch=torch.__version__, **sizes)
    with process_group(first.device, World()), tempfile.TemporaryDirectory() as scratch:
        corpus = prepare(first.cfg.data, first.cfg.tokenizer)
        weights = draw(first.model, first.device.torch)
        as_hugging_face(Path(scratch), weights, settings_with_defaults(first.cfg.model), torch.bfloat16)
        stage.add(event="weights drawn")
        for mode in modes:
            share = EAGER_SHARE if mode == "eager" and len(modes) > 1 else 1.0
            part = replace(stage, until=time.monotonic() + share * stage.left())
            made = makers(job_of(mode, stage), corpus, weights, Path(scratch))
            if mode == "eager":
                wide = job_of(mode, stage, f"train.loss_chunk={WIDE_CHUNK}"), corpus, weights, Path(scratch)
                made[f"ours, chunks of {WIDE_CHUNK} tokens"] = makers(*wide)["ours"]
                del wide
            compare(part, mode, made, tokens_per_step(first.cfg))
            del made  # with our model
            release(stage)


def job_of(mode: str, stage: Stage, *other: str) -> Preflight:
    compiled = f"parallel.compile={str(mode == 'compiled').lower()}"
    words = (*(TINY if stage.tiny else FULL), *COMMON, f"device={stage.device.type}", compiled, *other)
    return preflight(tpresearch.load(*words), World())


def draw(model: nn.Module, device: torch.device) -> dict[str, Tensor]:
    """Initial weights in bfloat16 by name, in host memory, of the usual spread: drawn on the device, which takes no time."""
    torch.manual_seed(1)
    found = {}
    for name, parameter in model.named_parameters():
        weight = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
        found[name] = (weight.normal_(std=0.02) if weight.dim() > 1 else weight).cpu()
    return found


def makers(job: Preflight, corpus: AnyCorpus, weights: dict[str, Tensor], folder: Path) -> dict[str, Make]:
    """What builds each contender."""
    cfg, device = job.cfg, job.device
    assert device
    on, kind, args = device.torch, device.type, dict(cfg.model.args)
    source = Batches(corpus, cfg.train.global_batch_size, cfg.train.seed)

    def batches(step: int) -> tuple[Tensor, Tensor]:
        batch = source.batch(step).to(on)
        return batch.inputs, batch.targets

    def compiled(model: Any) -> Any:
        return torch.compile(model) if cfg.parallel.compile else model

    def ours() -> Iterator[float]:
        mesh = build_mesh(job.sizes, kind)
        observers = build_observers(job, mesh, device, None)
        loop = assemble(job, mesh, device, corpus, observers, partial(restore, weights=weights))
        mode = "compiled" if cfg.parallel.compile else "eager"
        run = Run(folder / f"run-{mode}-{cfg.train.loss_chunk}", World())
        return our_steps(loop, job, device, run)

    found: dict[str, Make] = {"ours": ours}
    taught, alone = (batches, adamw_of(cfg), cfg.train.clip_grad_norm, kind), ("none", 1, 1)
    found["fabric"] = partial(peer, "fabric", *alone, args, weights, *taught, "bf16-true", compiled)
    found["transformers"] = partial(peer, "transformers", *alone, folder, *taught, torch.bfloat16, compiled)
    found["plain"] = partial(peer, "plain", args, weights, *taught, compiled)
    return found


def peer(name: str, *given: Any) -> Iterator[float]:
    """Imported only here, so that a missing or broken library is this contender's error."""
    return importlib.import_module(f"{name}_llama").train(*given)


@torch.no_grad()
def restore(state: TrainState, weights: dict[str, Tensor]) -> None:
    with state.weights() as ours:
        for name, weight in ours.items():
            weight.copy_(weights[name])


def compare(stage: Stage, mode: str, made: dict[str, Make], tokens: int) -> None:
    """Build and warm up all, then let them take turns until all are taken or the time is over; a row for each."""
    torch._dynamo.reset()
    contenders: dict[str, Contender] = {}
    slowest = 0.0
    for name, make in made.items():
        if stage.left() < 1.2 * slowest + (TURNS_S if stage.on_cuda else 0):
            stage.add(event="no time left", contender=name, mode=mode)
            continue
        began = time.monotonic()
        guarded(stage, mode, name, lambda: warm_up(stage, mode, name, make, contenders))  # noqa: B023
        slowest = max(slowest, time.monotonic() - began)
    gc.disable()
    round_s = 0.0
    for turn in range(1 if stage.tiny else TURNS):
        if turn and stage.left() < 1.2 * round_s:
            break
        began = time.monotonic()
        order = list(contenders)
        for nth in range(len(order)):
            name = order[(turn + nth) % len(order)]
            if not guarded(stage, mode, name, partial(contenders[name].take_turn, stage)):
                del contenders[name]
        stage.add(event="turn", mode=mode, step_s={c.name: c.seconds[-1] for c in contenders.values()})
        round_s = time.monotonic() - began
    gc.enable()
    report(stage, mode, contenders, tokens)
    for contender in contenders.values():
        contender.steps.close()  # pyrefly: ignore[missing-attribute]


def guarded(stage: Stage, mode: str, name: str, act: Callable[[], None]) -> bool:
    """Whether that worked; an error is a row."""
    try:
        act()
        return True
    except Exception as error:
        stage.add(contender=name, mode=mode, error=type(error).__name__, said=str(error)[:300])
    release(stage)  # only here: as long as there is the error, there are the tensors of its frames
    return False


def warm_up(stage: Stage, mode: str, name: str, make: Make, contenders: dict[str, Contender]) -> None:
    before, began = reset_peak(stage), time.monotonic()
    steps = make()
    losses = [next(steps)]
    stage.wait()
    first_s = time.monotonic() - began
    losses += [next(steps) for _ in range(WARM_UP - 1)]
    stage.wait()
    held = torch.cuda.memory_allocated() - before if stage.on_cuda else 0
    contenders[name] = Contender(name, steps, losses, held)
    row = {"peak_bytes": torch.cuda.max_memory_allocated() - before} if stage.on_cuda else {}
    stage.add(event="warm", contender=name, mode=mode, first_step_s=round(first_s, 2), losses=losses, **row)


def report(stage: Stage, mode: str, contenders: dict[str, Contender], tokens: int) -> None:
    """A row each; times relative to ours of the same turn, above 1 where ours is faster."""
    ours = contenders.get("ours")
    for name, contender in contenders.items():
        turns = len(contender.seconds)
        row: dict[str, Any] = {"version": version(name), "turns": turns, "losses": contender.losses}
        if turns:
            row["step_s"] = contender.seconds
            row["tokens_per_second"] = round(tokens / statistics.median(contender.seconds))
        if turns > 1 and ours and len(ours.seconds) == turns:
            ratios = [a / b for a, b in zip(contender.seconds, ours.seconds, strict=True)]
            row["time_ratio_quartiles"] = [round(x, 4) for x in statistics.quantiles(ratios, n=4)]
        if ours:
            apart = [abs(a - b) / abs(b) for a, b in zip(contender.losses, ours.losses, strict=False)]
            row |= {"first_loss_differs_by": apart[0], "losses_differ_by": max(apart)}
            row["same_work"] = apart[0] <= FIRST_TOLERANCE and max(apart) <= TOLERANCE
        if stage.on_cuda:
            row["held_bytes"] = contender.held_bytes
            row["peak_bytes"] = contender.held_bytes + contender.step_bytes
        stage.add(contender=name, mode=mode, nvidia_smi=card_now(), **row)


def reset_peak(stage: Stage) -> int:
    """Bytes allocated now, from which on the peak is counted."""
    if not stage.on_cuda:
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def release(stage: Stage) -> None:
    gc.unfreeze()
    gc.collect()
    if stage.on_cuda:
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
