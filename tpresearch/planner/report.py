"""A ranking as a table, as data and as a picture."""

from __future__ import annotations

import dataclasses
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tpresearch.config.choices import Checkpointing
from tpresearch.config.schema import MeshConfig
from tpresearch.launch.command import Command, is_within, override_key
from tpresearch.planner.candidates import Candidate
from tpresearch.planner.ranking import RankedCandidate, Ranking
from tpresearch.simulate.cluster import Cluster
from tpresearch.simulate.report import step_text
from tpresearch.track.text import count_text, share_text

MAX_SHOWN = 12
EXPERIMENT = "pretraining"
"""The experiment that conf/planner.yaml composes by default."""
OWN_DEFAULTS = ("model", "data", "tokenizer")
"""Config groups of which conf/planner.yaml composes other options than conf/train.yaml."""
CHOSEN_KEYS = ("world_size", "mesh", "train.micro_batch_size")
PLAN_KEYS = ("parallel", "parallel.tensor", "parallel.data", "parallel.activation_checkpointing")
"""Keys that the planner chooses."""
PLANNER_KEYS = (*CHOSEN_KEYS, "gpus", "cluster", "trace", "hydra")
"""Those, and keys that no training reads, but for hydra.searchpath."""


def report(ranking: Ranking, name: str, gpus: int, cluster: str, command: Command | None) -> str:
    """As text.

    Args:
        command: the one that trains the best candidate.
    """
    lines = [
        f"PREDICTED, not measured: {ranking.count} ways to train {name} on {_devices(gpus)} of {cluster}",
        "",
    ]
    lines += [f"  {line}" for line in advice(ranking, gpus, name)]
    if ranking.fits:
        lines += ["", f"  {'':>3}{'tok/s/device':>13}{'MFU':>7}{'memory':>9}  {'step time':26}plan"]
        shown = enumerate(ranking.fits[:MAX_SHOWN], 1)
        lines += [_table_row(place, one, ranking.fits[0]) for place, one in shown]
        if len(ranking.fits) > MAX_SHOWN:
            lines.append(f"  ... and {len(ranking.fits) - MAX_SHOWN} more that fit, in planner.json")
        lines += ["", f"  to train it: {command}"]
    if left_out := list(_left_out(ranking)):
        lines += ["", *left_out]
    return "\n".join(lines)


def _devices(number: int) -> str:
    return f"{number:,} device{'s' if number > 1 else ''}"


def advice(ranking: Ranking, gpus: int, name: str) -> Sequence[str]:
    """Answers to the first questions: does it fit, and does tensor parallelism pay."""
    if not (ranking.fits or ranking.too_large or any(one.is_valid for one in ranking.refused)):
        why, _ = Counter(one.why for one in ranking.refused).most_common(1)[0]
        return [f"no plan is valid for {name} on {_devices(gpus)}; the most common reason: {why}"]
    if not ranking.fits:
        least = ranking.too_large[0].prediction if ranking.too_large else None
        held = (
            f": the least that any plan holds is {least.peak_bytes / 1e9:.0f} GB per device" if least else ""
        )
        enough = f"; {ranking.enough:,} would hold its state" if ranking.enough else ""
        return [f"{name} does not fit on {_devices(gpus)}{held}{enough}"]
    if gpus == 1:
        return [
            "on one device there is nothing to shard: checkpointing and the micro-batch are left to choose"
        ]
    plain, tensor = ranking.best(tensor=False), ranking.best(tensor=True)
    if plain is None:
        return [
            f"tensor parallelism is needed: no plan without it is valid with these settings and fits on {_devices(gpus)}"
        ]
    if tensor is None:
        return ["tensor parallelism is not an option here: no legal plan with it fits"]
    gain = tensor.speed / plain.speed - 1
    if gain > 0.02:
        return [
            f"tensor parallelism pays: {gain:+.1%} over the best plan without it ({plain.candidate.overrides})"
        ]
    if gain < -0.02:
        return [f"do not use tensor parallelism here: the best plan with it is {-gain:.1%} slower"]
    return [f"tensor parallelism makes no difference here ({gain:+.1%})"]


def not_used(typed: Sequence[str]) -> str | None:
    """A sentence that names the overrides of the planner's command whose keys it chooses itself, if there are any."""
    words = [word for word in typed if _changes(word, (*CHOSEN_KEYS, "trace"))]
    if not words:
        return None
    return f"not used, since the planner compares plans for gpus: {shlex.join(words)}; for one plan, python -m tpresearch.simulate"


def _changes(word: str, branches: Sequence[str]) -> bool:
    """Whether an override is of the plan or within one of these branches of the config."""
    key = override_key(word)
    return key in PLAN_KEYS or any(is_within(key, branch) for branch in branches)


def training_command(
    best: Candidate,
    typed: Sequence[str],
    cluster: Cluster,
    mesh: MeshConfig,
    options: Mapping[str, str | None],
) -> Command:
    """The command that trains a candidate, on nodes of the cluster's size.

    Args:
        typed: overrides of the planner's command. mesh: as it was composed: an experiment may set an axis that the candidate has
            not. options: of each config group: an experiment leaves some to the program's defaults.
    """
    searched = "hydra.searchpath"  # where a model of one's own is found
    kept = [word for word in typed if override_key(word) == searched or not _changes(word, PLANNER_KEYS)]
    named = {override_key(word) for word in kept}
    if "experiment" in named:
        chosen = {group: options.get(group) for group in OWN_DEFAULTS if group not in named}
        kept += [f"{group}={option}" for group, option in chosen.items() if option]
    else:
        kept = [f"experiment={EXPERIMENT}", *kept]
    sizes = best.sizes.nontrivial()
    composed = dataclasses.asdict(mesh)
    kept += [f"mesh.{axis}=null" for axis, size in composed.items() if size and axis not in sizes]
    world = best.sizes.world
    nodes = cluster.nodes_of(world)
    program = ("train.py",) if Path("train.py").is_file() else ("-m", "tpresearch.train")
    ranks = world // nodes if world > 1 else None
    return Command((*kept, *best.overrides.split()), ranks, nodes, program=program)


def as_json(ranking: Ranking) -> dict[str, Any]:
    front = {id(one) for one in ranking.pareto_front()}
    return {
        "predicted": True,
        "fits": [
            {**_candidate_json(one), "on_front": id(one) in front, "why": why_slower(one, ranking.fits[0])}
            for one in ranking.fits
        ],
        "too_large": [_candidate_json(one) for one in ranking.too_large],
        "refused": [{"plan": one.overrides, "why": one.why} for one in ranking.refused],
    }


def draw(ranking: Ranking, title: str, path: Path) -> None:
    """Memory against speed of everything that fits, and the front that no other candidate beats in both."""
    from matplotlib.figure import Figure  # late: it takes a second

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    for label, tensor, marker in (
        ("data parallel alone", False, "o"),
        ("with tensor parallelism", True, "^"),
    ):
        mine = [one for one in ranking.fits if (one.candidate.sizes.tp > 1) == tensor]
        axes.scatter(*_coordinates(mine), marker=marker, label=label, alpha=0.7)
    front = ranking.pareto_front()
    axes.plot(*_coordinates(front), color="black", linewidth=1, label="no other is better in both")
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.set_xlim(left - 0.4 * (right - left), right)
    free, line = bottom, (top - bottom) / 40
    # Names stand above and to the left of the front, where no candidate is.
    for plan, same in groupby(reversed(front), key=_plan_text):
        ones = list(same)
        rows = dict.fromkeys(str(one.candidate.cfg.train.micro_batch_size) for one in (ones[0], ones[-1]))
        at = max(ones[-1].speed, free)
        name = f"{plan}, {' to '.join(rows)} {'row' if [*rows] == ['1'] else 'rows'}  "
        axes.text(_peak_gb(ones[-1]), at, name, ha="right", va="bottom", fontsize=7)
        free = at + line
    axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= right])
    axes.set_xlabel("memory at the peak, GB per device")
    axes.set_ylabel("tokens/s per device")
    axes.set_title(f"{title}, predicted")
    axes.legend(loc="lower right")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _coordinates(ones: Sequence[RankedCandidate]) -> tuple[list[float], list[float]]:
    return [_peak_gb(one) for one in ones], [one.speed for one in ones]


def _plan_text(one: RankedCandidate) -> str:
    tp, plan = one.candidate.sizes.tp, one.candidate.cfg.parallel
    kept = plan.activation_checkpointing
    checkpointed = "" if kept is Checkpointing.none else f", {kept} checkpointing"
    return f"{plan.name}{f' tp={tp}' if tp > 1 else ''}{checkpointed}"


def _table_row(place: int, one: RankedCandidate, best: RankedCandidate) -> str:
    prediction, why = one.prediction, why_slower(one, best)
    about = f"{count_text(one.speed):>13}{share_text(prediction.mfu):>7}{_peak_gb(one):>6.1f} GB"
    line = f"  {place:>2} {about}  {step_text(prediction):26}{one.candidate.overrides}"
    return f"{line}   ({why})" if why else line


def why_slower(one: RankedCandidate, best: RankedCandidate) -> str:
    """Where a step spends more time than the best candidate's, as shares of the latter; the global batch is the same."""
    if one is best:
        return ""
    mine, its, step = one.prediction.time_s, best.prediction.time_s, best.prediction.step_time_s
    if one.prediction.step_time_s <= 1.01 * step:
        return "as fast, within a percent"
    parts = {name: (mine.get(name, 0.0) - its.get(name, 0.0)) / step for name in {*mine, *its}}
    first, *others = sorted(parts.items(), key=lambda item: -item[1])[:2]
    worst = [first, *(part for part in others if part[1] > 0.01)]
    return ", ".join(f"{_format_part(name)} +{share:.1%}" for name, share in worst)


def _format_part(name: str) -> str:
    if name.startswith("exposed "):
        return f"waits for {name.removeprefix('exposed ')}"
    return {"gemm": "matmuls", "copy": "FSDP's copies", "elementwise": "elementwise ops"}.get(name, name)


def _left_out(ranking: Ranking) -> Iterator[str]:
    if ranking.too_large:
        yield f"  {len(ranking.too_large)} need more memory than a device has; the smallest:"
        for one in ranking.too_large[:3]:
            card = one.prediction.cluster["memory_gb"]
            yield f"    {_peak_gb(one):.1f} of {card:.0f} GB  {one.candidate.overrides}"
    if ranking.refused:
        yield f"  {len(ranking.refused)} were not simulated:"
        for why, count in Counter(one.why for one in ranking.refused).most_common(5):
            example = next(one.overrides for one in ranking.refused if one.why == why)
            yield f"    {count} x {why} ({example})"


def _candidate_json(one: RankedCandidate) -> dict[str, Any]:
    plan, mesh = one.candidate.overrides, one.candidate.sizes.nontrivial()
    return {"plan": plan, "mesh": mesh, **one.prediction.figures, "time_s": one.prediction.time_s}


def _peak_gb(one: RankedCandidate) -> float:
    return one.prediction.peak_bytes / 1e9
