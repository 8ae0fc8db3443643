"""Ranking of candidates: closed formulas discard what cannot fit, the simulator ranks the rest and says why each is slower."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing import get_context
from typing import TypeVar

from rich.console import Console
from rich.progress import track

from tpresearch.config import Config
from tpresearch.config.axes import REPLICATE, MeshSizes
from tpresearch.config.errors import ConfigError, format_value
from tpresearch.config.validate import has_master_weights, micro_batches
from tpresearch.launch.progress_bars import keep_bars_in_process
from tpresearch.ledger.memory_formulas import expected_memory
from tpresearch.planner.candidates import Candidate, Rejected, candidate_plans, micro_batch_rows
from tpresearch.simulate.cluster import Cluster, check_world
from tpresearch.simulate.depth import RECORDED_DEPTHS, TOLERANCE, Recording, recording
from tpresearch.simulate.fake_ranks import fake_mesh
from tpresearch.simulate.fake_step import record
from tpresearch.simulate.prediction import Prediction, predict
from tpresearch.simulate.rows import FEW_ROWS, MORE_ROWS, with_rows
from tpresearch.simulate.trace import Trace
from tpresearch.train.cross_entropy import chunk_count
from tpresearch.train.preflight import plan_model

Item = TypeVar("Item")
Outcome = TypeVar("Outcome")

DOUBLINGS = 10
"""How often the number of devices is doubled in search of one that holds a model."""


@dataclass(frozen=True)
class RankedCandidate:
    """One candidate with its prediction."""

    candidate: Candidate
    prediction: Prediction

    @property
    def speed(self) -> float:
        return self.prediction.tokens_per_second_per_device


@dataclass
class Ranking:
    """All candidates: those that fit, fastest first, those that do not fit, and those that are not valid configs."""

    fits: list[RankedCandidate] = field(default_factory=list)
    too_large: list[RankedCandidate] = field(default_factory=list)
    refused: list[Rejected] = field(default_factory=list)
    enough: int | None = None
    """If none fits: devices that would hold at least the model's state."""

    @property
    def count(self) -> int:
        return len(self.fits) + len(self.too_large) + len(self.refused)

    def best(self, tensor: bool) -> RankedCandidate | None:
        """The fastest with tensor parallelism, or without."""
        return next((one for one in self.fits if (one.candidate.sizes.tp > 1) == tensor), None)

    def pareto_front(self) -> list[RankedCandidate]:
        """The Pareto front: candidates that no other beats in both memory and speed, the fastest first."""
        found: list[RankedCandidate] = []
        for one in sorted(self.fits, key=lambda one: (-one.speed, one.prediction.peak_bytes)):
            if not found or one.prediction.peak_bytes < found[-1].prediction.peak_bytes:
                found.append(one)
        return found


def rank(cfg: Config, gpus: int, cluster: Cluster, workers: int = 1) -> Ranking:
    """Predict every candidate.

    Args:
        workers: processes that share the plans.
    """
    every = list(candidate_plans(cfg, gpus, cluster))
    left_out = [one for one in every if isinstance(one, Rejected)]
    legal = [one for one in every if isinstance(one, Candidate)]
    if not legal:
        return Ranking(refused=left_out)
    known = recording(legal[0].cfg, legal[0].sizes)
    possible, refused = _possible(legal, known, cluster)
    left_out += refused
    ranking = Ranking(refused=left_out)
    alike: dict[tuple[object, ...], list[Candidate]] = {}
    for family in possible:
        alike.setdefault(_block_of(family), []).append(family)
    for check in (False, True):
        predict_group = partial(_predict_alike, known=known, cluster=cluster, check=check)
        every_group = _predict_all(predict_group, [*alike.values()], workers)
        outcomes = [one for group in every_group for one in group]
        found = [one for one in outcomes if isinstance(one, RankedCandidate)]
        cannot_run = [one for one in outcomes if isinstance(one, Rejected)]
        if not found and cannot_run and cannot_run[0].error:  # whatever the plan
            raise cannot_run[0].error
        ranking.fits = sorted((one for one in found if one.prediction.fits), key=lambda one: -one.speed)
        others = (one for one in found if not one.prediction.fits)
        ranking.too_large = sorted(others, key=lambda one: one.prediction.peak_bytes)
        ranking.refused = [*left_out, *cannot_run]
        if check or not ranking.fits or _holds(ranking.fits[0], known, cluster):
            break
    if not ranking.fits:
        ranking.enough = _enough(cfg, gpus, cluster, known)
    return ranking


def _holds(best: RankedCandidate, known: Recording, cluster: Cluster) -> bool:
    """Whether the whole model does what two shallow ones tell of it; otherwise each candidate is compared with a third."""
    if known.is_shallow:
        return True
    asked, told = best.candidate, best.prediction
    real = predict(replace(known, cfg=asked.cfg, sizes=asked.sizes, traces={}), cluster)
    pairs = (told.step_time_s, real.step_time_s), (told.peak_bytes, real.peak_bytes)
    return all(abs(ours - its) <= TOLERANCE * its for ours, its in pairs)


def _possible(
    legal: Sequence[Candidate], known: Recording, cluster: Cluster
) -> tuple[list[Candidate], list[Rejected]]:
    """Those whose state fits, and the others."""
    possible: list[Candidate] = []
    refused: list[Rejected] = []
    objections: dict[tuple[object, ...], tuple[str, bool] | None] = {}
    for family in legal:
        plan = family.cfg.parallel.name, *family.sizes.nontrivial().items()
        if plan not in objections:  # whatever is checkpointed
            objections[plan] = _objection(family, known, cluster)
        if objection := objections[plan]:
            refused.append(Rejected(family.overrides, *objection))
        else:
            possible.append(family)
    return possible, refused


def _enough(cfg: Config, gpus: int, cluster: Cluster, known: Recording) -> int | None:
    """The least number of devices, of the double, the fourfold and so on, that hold the model's state in some plan."""
    for devices in (gpus * 2**i for i in range(1, DOUBLINGS + 1)):
        try:
            check_world(cluster, devices)
        except ConfigError:
            continue
        legal = [one for one in candidate_plans(cfg, devices, cluster) if isinstance(one, Candidate)]
        if _possible(legal, known, cluster)[0]:
            return devices
    return None


def _predict_all(
    predict: Callable[[Item], list[Outcome]], items: Sequence[Item], workers: int
) -> list[list[Outcome]]:
    """The predictions, in the order of the items. Workers are forked from a process that has only imported torch; a killed
    one is an error, where `multiprocessing.Pool` would wait forever."""
    if workers == 1:
        return [predict(item) for item in _shown(items)]
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(max(1, min(workers, len(items))), context, keep_bars_in_process) as pool:
        try:
            begun = [pool.submit(predict, item) for item in items]
            return [future.result() for future in _shown(begun)]
        except BaseException:  # an error or an interrupt need not wait for what the others do
            for worker in list(pool._processes.values()):
                worker.kill()
            raise


def _shown(items: Sequence[Item]) -> Iterable[Item]:
    """The items; a terminal is shown how many of them have been taken."""
    console, hidden = Console(stderr=True), not sys.stderr.isatty()
    return track(items, "predicting", console=console, transient=True, disable=hidden)


def _block_of(family: Candidate) -> tuple[object, ...]:
    """What a rank's block depends on, as it is compiled: neither on the number of replicas nor on that of shards."""
    parallel, sizes = family.cfg.parallel, family.sizes
    return parallel.tensor, sizes.tp, parallel.activation_checkpointing, has_master_weights(family.cfg, sizes)


def _predict_alike(
    families: Sequence[Candidate], known: Recording, cluster: Cluster, check: bool = False
) -> list[RankedCandidate | Rejected]:
    """Predictions of plans that are one to `_block_of`, whose block is compiled once; or why its step is refused, as of blocks that change
    in place what one kind of checkpointing keeps."""
    first = replace(known, cfg=families[0].cfg, sizes=families[0].sizes)
    alike = replace(known, compiler=lambda *_: first.block)
    found: list[RankedCandidate | Rejected] = []
    for family in families:
        try:
            found += _predict_each_micro_batch(family, alike, cluster, check)
        except ConfigError as error:
            found.append(Rejected(family.overrides, _reason(error), error=error))
    return found


def _predict_each_micro_batch(
    family: Candidate, known: Recording, cluster: Cluster, check: bool = False
) -> list[RankedCandidate]:
    """Predictions from two rows per micro-batch up to the first that does not fit; one row, which is no faster, only if two do not fit."""
    traces = _Traces(family)
    single, *more = micro_batch_rows(family)
    found: list[RankedCandidate] = []
    known = replace(known, sizes=family.sizes, recorder=traces.trace)

    def predicted(rows: int) -> RankedCandidate:
        candidate = family.with_micro_batch(rows)
        return RankedCandidate(
            candidate, predict(replace(known, cfg=candidate.cfg, traces={}), cluster, check)
        )

    with fake_mesh(family.sizes):  # of all that it records
        for rows in more:
            found.append(predicted(rows))
            if not found[-1].prediction.fits:
                break
        if not found or not found[0].prediction.fits:
            found.append(predicted(single))
    return found


def _objection(candidate: Candidate, known: Recording, cluster: Cluster) -> tuple[str, bool] | None:
    """Why it need not be simulated, and whether it is a valid config: its state alone does not fit."""
    try:
        held = _minimum_memory(candidate, known)
    except ConfigError as error:
        return _reason(error), False
    room_gb = cluster["memory_gb"] - cluster["memory_reserved_gb"]
    if held <= room_gb * 1e9:
        return None
    return f"weights, gradients and optimizer state alone are {held / 1e9:.0f} of {room_gb:.0f} GB", True


def _reason(error: ConfigError) -> str:
    return f"{error.field}={format_value(error.value)}: {error.why}"


def _minimum_memory(candidate: Candidate, known: Recording) -> int:
    """Bytes of weights, gradients and optimizer state per rank, exact and without recording a step, since all blocks are alike."""
    if known.is_shallow:
        return _state_bytes(candidate.cfg, candidate.sizes)
    shallow = replace(known, cfg=candidate.cfg)
    two, three = (_state_bytes(shallow.at(depth), candidate.sizes) for depth in RECORDED_DEPTHS)
    return two + (known.depth - RECORDED_DEPTHS[0]) * (three - two)


def _state_bytes(cfg: Config, sizes: MeshSizes) -> int:
    model, plan = plan_model(cfg, sizes)
    kinds = expected_memory(model, plan, cfg)
    return sum(kinds[kind] or 0 for kind in ("parameters", "gradients", "optimizer"))


class _Traces:
    """Recorded steps of a plan on a mesh, at few blocks and few rows per micro-batch; larger ones are extrapolated."""

    def __init__(self, family: Candidate) -> None:
        # As many as there are of one row, and two at least: `Trace.ops` takes those that it needs.
        self._micro_batches = max(2, micro_batches(family.cfg, family.sizes))
        self._recorded: dict[tuple[str, int], Trace] = {}

    def trace(self, cfg: Config, sizes: MeshSizes, _: object) -> Trace:
        rows = cfg.train.micro_batch_size or 1
        if micro_batches(cfg, sizes) == 1 and (rows <= FEW_ROWS or sizes[REPLICATE.name] > 1):
            return record(cfg, sizes)  # none of several micro-batches both sets gradients and sums them
        if rows <= MORE_ROWS:
            return self._recorded_at(rows, cfg, sizes)
        if len({_chunk(cfg, rows) for rows in (FEW_ROWS, MORE_ROWS, rows)}) > 1:
            return record(cfg, sizes)
        few, more = (self._recorded_at(recorded, cfg, sizes) for recorded in (FEW_ROWS, MORE_ROWS))
        return with_rows(few, more, rows) or record(cfg, sizes)

    def _recorded_at(self, rows: int, cfg: Config, sizes: MeshSizes) -> Trace:
        key = str(cfg.model.args), rows
        if key not in self._recorded:
            batch = self._micro_batches * rows * sizes.dp
            train = replace(cfg.train, micro_batch_size=rows, global_batch_size=batch)
            self._recorded[key] = record(replace(cfg, train=train), sizes)
        return self._recorded[key]


def _chunk(cfg: Config, rows: int) -> tuple[int, int] | None:
    """Number of tokens whose logits exist at once, if the loss is computed in chunks, and of chunks that have one more."""
    tokens, most = rows * cfg.data.seq_len, cfg.train.loss_chunk
    return divmod(tokens, chunk_count(tokens, most)) if most else None
