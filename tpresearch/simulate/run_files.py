"""The files of a prediction: the record of a run, marked as predicted, for comparisons and sweeps with real runs; a Chrome trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tpresearch.config.compose import as_dict
from tpresearch.config.validate import tokens_per_step
from tpresearch.ledger.entries import MEMORY_KINDS, Expected, StepLedger
from tpresearch.simulate.prediction import Prediction
from tpresearch.simulate.replay import Span
from tpresearch.track import record
from tpresearch.track.metrics_file import MetricsFile
from tpresearch.track.text import run_name


def write_run(prediction: Prediction, folder: Path) -> None:
    """config.yaml, ledger.json, one row of metrics.jsonl, and summary.json; the device says that it was predicted."""
    cfg, sizes, tokens = prediction.cfg, prediction.sizes, tokens_per_step(prediction.cfg)
    ledger = StepLedger(
        prediction.entries, prediction.held, None, Expected(None, dict.fromkeys(MEMORY_KINDS))
    )
    figures = {
        "perf/step_time_s": prediction.step_time_s,
        "perf/tokens_per_second": prediction.tokens_per_second_per_device * sizes.world,
        "perf/tokens_per_second_per_device": prediction.tokens_per_second_per_device,
        "perf/mfu": prediction.mfu,
        "memory/peak_bytes": prediction.allocated_bytes,
        "comm/bytes_per_step": ledger.sent_bytes,
    }
    summary: dict[str, Any] = {
        "status": "completed",
        "predicted": True,
        "run_name": f"{run_name(cfg, sizes)} (predicted)",
        "steps": 1,
        "tokens": tokens,
        "world_size": sizes.world,
        "mesh": sizes.nontrivial(),
        "model": cfg.model.name,
        "parallel": cfg.parallel.name,
        "dtype": str(cfg.train.dtype),
        "device": f"{prediction.cluster.name} (predicted)",
        **figures,
        **ledger.summary(),
    }
    record.write_config(folder, as_dict(cfg))
    rows = MetricsFile(folder)
    rows.append({"train/step": 1, "train/tokens": tokens, **figures})
    rows.close()
    record.write_ledger(folder, ledger.as_json())
    record.write_summary(folder, summary)


def write_trace(spans: Sequence[Span], path: Path) -> None:
    """Events of the trace format's "X" kind (chrome://tracing, Perfetto), a row per stream, times in microseconds."""
    streams = list(dict.fromkeys(span.stream for span in spans))
    names = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": tid, "args": {"name": stream}}
        for tid, stream in enumerate(streams)
    ]
    events = [
        {
            "ph": "X",
            "name": span.name,
            "pid": 0,
            "tid": streams.index(span.stream),
            "ts": span.start_s * 1e6,
            "dur": span.seconds * 1e6,
        }
        for span in spans
    ]
    record.write_atomically(path, json.dumps({"traceEvents": [*names, *events]}))
