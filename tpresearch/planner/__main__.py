"""`python -m tpresearch.planner model=llama2_70b cluster=h100_dgx gpus=64`: all legal plans, ranked by the simulator."""

from __future__ import annotations

import dataclasses
import signal
from typing import NoReturn

from tpresearch.config import Config, ConfigError
from tpresearch.config.choices import DataPlan, TensorPlan
from tpresearch.config.schema import MeshConfig
from tpresearch.config.world import World, usable_cores
from tpresearch.launch import Run, entrypoint
from tpresearch.launch.composition import chosen_files, chosen_options
from tpresearch.launch.garbage import gc_paused
from tpresearch.launch.hydra_app import typed_overrides
from tpresearch.launch.stop import Stopped
from tpresearch.planner.candidates import Candidate, candidate_plans
from tpresearch.simulate.preflight import SimulationPreflight, check_simulation
from tpresearch.simulate.sources import with_own_sources
from tpresearch.track.record import write_json


def preflight_planner(cfg: Config, world: World) -> SimulationPreflight:
    """Its plan, mesh and micro-batch are what the planner chooses; all else has to be right.

    Raises:
        ConfigError: as simulate does, for one representative plan; for a batch that no plan can split; for a number of ranks that
            was meant to be `gpus`; for rows of numbers with the experiment's length of a sequence.
    """
    if cfg.world_size != cfg.gpus and "world_size" in typed_overrides():
        fix = {"world_size": None, "gpus": cfg.world_size}
        raise ConfigError(
            "world_size", cfg.world_size, "the planner plans for gpus", f"gpus={cfg.world_size}", fix
        )
    if not cfg.data.has_sequence and (length := cfg.data.seq_len) > 1:  # as experiment=pretraining has it
        why = "a row of numbers is no sequence, and would count as so many tokens"
        raise ConfigError("data.seq_len", length, why, "1", fix={"data.seq_len": 1})
    # Possible with all that is possible with some plan: fully_shard leaves no master weights to split, one micro-batch nothing to sum.
    tensor = TensorPlan.sp if cfg.parallel.async_tp else None
    parallel = dataclasses.replace(cfg.parallel, name="ddp", tensor=tensor, data=DataPlan.ddp)
    composed, train = cfg.mesh, dataclasses.replace(cfg.train, micro_batch_size=1)
    cfg = dataclasses.replace(cfg, parallel=parallel, mesh=MeshConfig(), train=train, world_size=cfg.gpus)
    rows, gpus = train.global_batch_size, cfg.gpus or 1
    try:
        # Plans with tensor parallelism split the batch over fewer ranks.
        splits = dataclasses.replace(train, global_batch_size=gpus if rows % gpus else rows)
        job = check_simulation(dataclasses.replace(cfg, train=splits), world)
        job = job._replace(cfg=dataclasses.replace(job.cfg, train=train, mesh=composed))
        plans = candidate_plans(job.cfg, job.sizes.world, job.cluster)
        return job if any(isinstance(one, Candidate) for one in plans) else check_simulation(cfg, world)
    except ConfigError as error:
        if error.field != "world_size":
            raise
        fix = {"gpus": fixed} if (fixed := error.fix.get("world_size")) else {}
        raise ConfigError("gpus", error.value, error.why, error.legal, fix) from error


def _stop(number: int, _: object) -> NoReturn:
    raise Stopped(number)


@entrypoint("planner", preflight=preflight_planner)
def main(job: SimulationPreflight, run: Run) -> None:
    with gc_paused():  # late: they import torch
        from tpresearch.planner.ranking import rank
        from tpresearch.planner.report import as_json, draw, not_used, report, training_command
        from tpresearch.simulate.run_files import write_run

    cfg, sizes = job.cfg, job.sizes
    cluster = with_own_sources(job.cluster, chosen_files("cluster"), run.command.arguments)
    signal.signal(signal.SIGTERM, _stop)  # else semaphores of its workers would be left, and reported
    ranking = rank(cfg, sizes.world, cluster, workers=usable_cores())
    write_json(run.folder / "planner.json", as_json(ranking))
    best = ranking.fits[0] if ranking.fits else None
    typed, options = run.command.arguments, chosen_options()
    command = training_command(best.candidate, typed, cluster, cfg.mesh, options) if best else None
    print(report(ranking, cfg.model.name, sizes.world, cluster.name, command))
    if unused := not_used(typed):
        print(f"\n  {unused}")
    print(f"\n  {run.folder / 'planner.json'}")
    if best:
        write_run(best.prediction, run.folder)
        title = f"{cfg.model.name} on {sizes.world:,} devices of {cluster.name}"
        draw(ranking, title, run.folder / "planner.png")
        print(f"  {run.folder / 'planner.png'}")


if __name__ == "__main__":
    main()
