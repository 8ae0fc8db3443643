"""A predicted step as a Chrome trace (chrome://tracing, Perfetto): a row per stream."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tpresearch.simulate.replay import Span


def write_trace(spans: Sequence[Span], path: Path) -> None:
    """Events of the trace format's "X" kind, times in microseconds."""
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
    path.write_text(json.dumps({"traceEvents": [*names, *events]}))
