"""A prediction on the terminal: step time, memory, time by kind, assumptions."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from tpresearch.config.axes import AXIS_NAMES
from tpresearch.config.choices import Checkpointing, Dtype
from tpresearch.config.validate import micro_batch_size, micro_batches
from tpresearch.simulate.cluster import SourceKind
from tpresearch.simulate.prediction import Prediction, rows_that_fit
from tpresearch.track.text import count_text, decimal_bytes_text, figures_text, share_text

BAR = 32
WIDTH = 120
SHOWN_CHECKS = 3
SHOWN_ASSUMPTIONS = 6


def report(prediction: Prediction) -> str:
    """The main content of simulate.json as text."""
    return "\n".join(
        [*_headline(prediction), "", *_memory(prediction), "", *_time(prediction), "", *_assumed(prediction)]
    )


def step_text(prediction: Prediction) -> str:
    """`1.48 s (1.39 to 1.57)`."""
    seconds = prediction.step_time_s, prediction.low_s, prediction.high_s
    unit, scale = ("s", 1.0) if seconds[0] >= 1 else ("ms", 1e3)
    step, low, high = (figures_text(value * scale) for value in seconds)
    return f"{step} {unit} ({low} to {high})"


def memory_text(prediction: Prediction) -> str:
    """Whether it fits, and if not, what would."""
    gb, spare = prediction.peak_bytes / 1e9, prediction.spare_bytes / 1e9
    held = f"{gb:.1f} of {prediction.cluster['memory_gb']:.0f} GB"
    if not prediction.fits:
        return f"{held}: does not fit; {_remedy(prediction)}"
    tight = ", so little that the allocator may retry" if prediction.is_tight else ""
    return f"{held}: fits with {spare:.1f} GB to spare{tight}"


def _remedy(prediction: Prediction) -> str:
    cfg, sizes = prediction.cfg, prediction.sizes
    rows, fits = micro_batch_size(cfg, sizes), rows_that_fit(prediction)
    if 0 < fits < rows:
        return f"train.micro_batch_size={fits} would"
    if sizes.shards == 1 and sizes.world > 1:
        return "a plan that shards weights, such as parallel=fsdp, holds less"
    if cfg.parallel.activation_checkpointing is Checkpointing.full:
        return "with more ranks to shard over, each holds less"
    return "more ranks to shard over, or parallel.activation_checkpointing=full, hold less"


def _headline(prediction: Prediction) -> Iterator[str]:
    cfg, sizes, cluster = prediction.cfg, prediction.sizes, prediction.cluster
    mesh = " x ".join(f"{axis}={size}" for axis, size in sizes.nontrivial().items()) or "1 rank"
    hosts = cluster.hosts_of(sizes.world)
    yield f"PREDICTED, not measured: {cfg.model.name}, parallel={cfg.parallel.name}, {mesh}, on {cluster.name} ({cluster.device})"
    count = micro_batches(cfg, sizes)
    yield (
        f"  {sizes.world:,} rank{'s' if sizes.world > 1 else ''} on {hosts:,} host{'s' if hosts > 1 else ''}; per rank and step {count} x "
        f"{micro_batch_size(cfg, sizes)} rows of {cfg.data.seq_len:,} tokens in {cfg.train.dtype}"
    )
    yield f"  {'step time':22}{step_text(prediction)}"
    yield f"  {'tokens/s per device':22}{count_text(prediction.tokens_per_second_per_device)}"
    yield f"  {'MFU':22}{share_text(prediction.mfu)}"
    slow, fast = (cluster.peak_flops(dtype) for dtype in (cfg.train.dtype, Dtype.bfloat16))
    if slow < fast / 4:
        less = f"{round(slow / 1e12, 2):g} instead of {round(fast / 1e12, 2):g} TFLOP/s with train.dtype=bfloat16"
        yield f"  {cfg.train.dtype:22}{less}, as in experiment=pretraining"


def _memory(prediction: Prediction) -> Iterator[str]:
    yield f"  {'memory':22}{memory_text(prediction)}"
    greatest = max(prediction.memory_bytes.values())
    for kind, size in prediction.memory_bytes.items():
        yield f"    {kind:20}{decimal_bytes_text(size):>11}  {_bar(size / greatest)}"


def _time(prediction: Prediction) -> Iterator[str]:
    step = prediction.step_time_s
    yield f"  {'time of a step':22}{'':>8}      overlapped work excluded"
    parts = sorted(prediction.time_s.items(), key=lambda item: -item[1])
    for kind, seconds in parts:
        if seconds > 0.001 * step:
            yield f"    {kind:20}{100 * seconds / step:8.1f} %   {_bar(seconds / step)}"
    for axis in AXIS_NAMES:
        mine = [entry for entry in prediction.communication if entry["axis"] == axis]
        if mine:
            sent, exposed = (sum(entry[key] for entry in mine) for key in ("time_s", "exposed_s"))
            moved = sum(entry["sent_bytes"] for entry in mine)
            yield f"  {axis:22}{decimal_bytes_text(moved):>11} sent in {sent * 1e3:,.1f} ms, of which {exposed * 1e3:,.1f} ms exposed"


def _assumed(prediction: Prediction) -> Iterator[str]:
    cluster = prediction.cluster
    checks = cluster.checked or ("never: no measurement of this cluster is known",)
    yield from _listed([("" if nth else "checked", check) for nth, check in enumerate(checks)], SHOWN_CHECKS)
    numbers = [
        (n.kind, f"{name}={n.value} ({n.source})")
        for name, n in cluster.assumptions()
        if n.kind in (SourceKind.guessed, SourceKind.fitted)
    ]
    yield from _listed(numbers, SHOWN_ASSUMPTIONS)
    if prediction.cfg.parallel.compile:
        yield f"  {'compile':22}fused elementwise kernels; what blocks keep is what torch's partitioner says"


def _listed(entries: Sequence[tuple[str, str]], most: int) -> Iterator[str]:
    for name, text in entries[:most]:
        yield textwrap.fill(text, WIDTH, initial_indent=f"  {name:22}", subsequent_indent=" " * 26)
    if len(entries) > most:
        yield f"  {'':22}and {len(entries) - most} more, in simulate.json"


def _bar(share: float) -> str:
    return "█" * max(1, round(min(1.0, share) * BAR)) if share > 0 else ""
