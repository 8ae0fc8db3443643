"""`python -m tpresearch.simulate world_size=512 cluster=h100_dgx model=llama2_70b mesh.tp=8`: predict one training step."""

from __future__ import annotations

from tpresearch.launch import Run, entrypoint
from tpresearch.launch.composition import chosen_files
from tpresearch.launch.garbage import gc_paused
from tpresearch.simulate.preflight import SimulationPreflight, preflight
from tpresearch.simulate.sources import with_own_sources
from tpresearch.track.record import write_json


@entrypoint("simulate", preflight=preflight)
def main(job: SimulationPreflight, run: Run) -> None:
    with gc_paused():  # late: they import torch
        from tpresearch.simulate.depth import recording
        from tpresearch.simulate.prediction import predict, step_seconds
        from tpresearch.simulate.replay import Span
        from tpresearch.simulate.report import report
        from tpresearch.simulate.run_files import write_run, write_trace

    cfg, sizes = job.cfg, job.sizes
    cluster = with_own_sources(job.cluster, chosen_files("cluster"), run.command.arguments)
    recorded = recording(cfg, sizes)
    prediction = predict(recorded, cluster)
    path = run.folder / "simulate.json"
    write_json(path, prediction.as_json())
    write_run(prediction, run.folder)
    print(report(prediction))
    print(*(f"\n  {line}" for line in (*job.notes, path)), sep="")
    if cfg.trace:
        spans: list[Span] = []
        step_seconds(recorded.trace(recorded.deepest), cfg, sizes, cluster, spans)
        write_trace(spans, run.folder / "trace.json")
        blocks = f"{recorded.deepest} of {recorded.depth} blocks"
        print(f"  {run.folder / 'trace.json'} ({blocks}, for chrome://tracing or ui.perfetto.dev)")


if __name__ == "__main__":
    main()
