"""Cost of reading a batch, compared with a training step: `python experiments/data_reading/measure.py`.

Prints results.csv and writes it (record.py says where).
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from tpresearch.data.batches import Batches
from tpresearch.data.streams import read_rows
from tpresearch.models.llama2 import Llama2

sys.path.append(str(Path(__file__).parents[1]))
from record import place, write_rows

VOCAB_SIZE = 4096
CORPUS_TOKENS = 200_000_000
SHAPES = [(24, 128), (8, 2048), (64, 2048), (8, 4096)]
"""(rows a rank reads at a step, seq_len): the default job first."""

HEADS = {"n_heads": 16, "n_kv_heads": 16}
TINY: dict[str, Any] = {"vocab_size": VOCAB_SIZE, "dim": 256, "n_layers": 2, **HEADS, "ffn_dim": 768}
"""conf/model/llama2_tiny.yaml: the smallest Llama2 here that anyone trains, so the shortest step."""


def median_s(call: Callable[[int], object], repeats: int) -> float:
    """Median seconds of call(0), call(1), ... after two calls to warm up."""
    seconds = []
    for index in range(repeats + 2):
        started = time.perf_counter()
        call(index)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[2:])


def step_s(rows: int, seq_len: int) -> float:
    """Median seconds of a step of llama2_tiny on this host's CPU: forward, backward, AdamW."""
    model = Llama2(**TINY, max_seq_len=seq_len)
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.randint(VOCAB_SIZE, (rows, seq_len + 1))

    def step(_: int) -> None:
        logits = model(tokens[:, :-1])
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()

    return median_s(step, repeats=3)


def measure(folder: Path, rows: int, seq_len: int) -> dict[str, object]:
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE, CORPUS_TOKENS, dtype=np.uint16)
    tokens.tofile(folder / f"{seq_len}-{rows}")
    packed = read_rows(folder / f"{seq_len}-{rows}", tokens.dtype.name, seq_len + 1)
    batches = Batches(packed, rows, seed=0)
    started = time.perf_counter()
    batches.row_indices(0)
    permutation_s = time.perf_counter() - started
    read_s = median_s(batches.batch, repeats=500)
    result: dict[str, object] = {
        "rows": rows,
        "seq_len": seq_len,
        "corpus_rows": len(packed),
        "epoch_permutation_ms": round(1e3 * permutation_s, 2),
        "read_ms_per_batch": round(1e3 * read_s, 4),
        "read_mtok_per_s": round(rows * seq_len / read_s / 1e6, 1),
    }
    if rows * seq_len <= 1 << 14:  # larger steps take the CPU minutes, and their ratio is smaller still
        step = step_s(rows, seq_len)
        result |= {"step_ms": round(1e3 * step, 1), "read_share_of_step": f"{read_s / step:.4%}"}
    return result


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(Path(folder), rows, seq_len) for rows, seq_len in SHAPES]
    write_rows(place(Path(__file__).parent) / "results.csv", results)
    for result in results:
        print("  ".join(f"{key} {value}" for key, value in result.items()))


if __name__ == "__main__":
    main()
