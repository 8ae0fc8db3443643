"""Predictions compared with measurements on one GPU: steps, peak memory and single ops.

python experiments/held_to_gpu/measure.py [RESULTS.jsonl ...]     # prints the tables, writes results.csv (record.py says where)

Each training of the results is simulated twice: on the cluster of conf/cluster that has such cards, and on one that
calibrate makes of the same file's measurements of single ops alone. Peaks are of torch's allocator.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from record import place, write_rows

from tpresearch.api import load
from tpresearch.calibrate.rows import Row, cluster_from_rows, read_rows
from tpresearch.config.validate import validate
from tpresearch.launch.composition import read_option
from tpresearch.launch.options import command
from tpresearch.simulate.cluster import Cluster, parse_cluster
from tpresearch.simulate.depth import recording
from tpresearch.simulate.prediction import Prediction, predict
from tpresearch.simulate.prices import ADAMW_BFLOAT16, attention_s, bytes_s, gemm_s

HERE = Path(__file__).parent
COMMON = (
    *("model=llama2_7b", "parallel=none", "data=random_tokens", "data.seq_len=4096", "logger=none"),
    *("train.dtype=bfloat16", "train.global_batch_size=8"),
)
MODELS = {
    "8b": ("model.n_kv_heads=8", "model.ffn_dim=14336", "tokenizer.vocab_size=128256"),
    "7b": ("tokenizer.vocab_size=32000",),
}
RESULTS = HERE.parent / "gpu" / "results"
"""Of which those of the README's three cards are compared where no files are named."""
CARDS = {"H200": "h200_dgx", "H100": "h100_dgx"}


def main() -> None:
    found = []
    for path in [Path(word) for word in sys.argv[1:]] or sorted(RESULTS.glob("h200-2026-11-26-*.jsonl")):
        rows = read_rows(path)
        option = next(
            option for card, option in CARDS.items() if any(card in row.get("card", "") for row in rows)
        )
        plain = read_option("cluster", option)
        cluster = parse_cluster(plain)
        alone = [row for row in rows if "us" in row]
        measures_all = any(row["op"].startswith("matmul") for row in alone)
        calibrated = parse_cluster(cluster_from_rows(rows, plain, "calibrated")) if measures_all else None
        print(f"\n{path.name}: steps and peaks, on {option} and as calibrated by this file's single ops")
        for row in (row for row in rows if "step_s" in row):
            found.append(held(path.name, row, cluster, calibrated))
            print(text(found[-1]), flush=True)
        if alone:
            print("\n  single ops, predicted beside measured, microseconds")
        for line in single_ops(alone, cluster):
            print(f"  {line}")
    write_rows(place(HERE) / "results.csv", found)


def held(source: str, row: Row, cluster: Cluster, calibrated: Cluster | None) -> dict[str, Any]:
    """One training: measured, and predicted on a cluster of conf/cluster and on one calibrated by single ops, if any."""
    stated, *by_ops = predictions(row, [cluster, calibrated] if calibrated else [cluster])
    peak = stated.peak_bytes - stated.memory_bytes["reserved"]
    seconds = by_ops[0].step_time_s if by_ops else None
    return {
        "file": source,
        "setting": row["id"],
        "measured_s": round(row["step_s"], 4),
        "predicted_s": round(stated.step_time_s, 4),
        "low_s": round(stated.low_s, 4),
        "high_s": round(stated.high_s, 4),
        "error": round(stated.step_time_s / row["step_s"] - 1, 4),
        "calibrated_s": seconds and round(seconds, 4),
        "calibrated_error": seconds and round(seconds / row["step_s"] - 1, 4),
        "measured_peak_gb": round(row["peak_bytes"] / 1e9, 2),
        "predicted_peak_gb": round(peak / 1e9, 2),
        "peak_error": round(peak / row["peak_bytes"] - 1, 4),
    }


def predictions(row: Row, clusters: list[Cluster]) -> list[Prediction]:
    given = row["overrides"]
    cfg = load(
        *COMMON,
        *MODELS[row["id"].split()[0]],
        f"train.weights={given['weights']}",
        f"train.loss_chunk={given['loss_chunk'] or 'null'}",
        f"train.float8={'tensorwise' if 'float8' in row['id'] else 'none'}",
        f"train.micro_batch_size={given['micro_batch_size']}",
        f"parallel.activation_checkpointing={given['activation_checkpointing']}",
        f"parallel.compile={str(given['compile']).lower()}",
        config_name="simulate",
    )
    recorded = recording(cfg, validate(cfg, 1))
    return [predict(recorded, cluster, check=False) for cluster in clusters]


def text(one: dict[str, Any]) -> str:
    seconds = one["calibrated_s"]
    calibrated = f"calibrated {seconds:.3f} ({one['calibrated_error']:+.1%})" if seconds else ""
    return (
        f"  {one['setting']:28}measured {one['measured_s']:.3f} s   predicted {one['predicted_s']:.3f} ({one['error']:+.1%})   "
        f"{calibrated:28}peak {one['measured_peak_gb']:.2f} GB, predicted {one['predicted_peak_gb']:.2f} ({one['peak_error']:+.1%})"
    )


def single_ops(rows: list[Row], cluster: Cluster) -> Iterator[str]:
    for row in rows:
        if seconds := price(row, cluster):
            shape = " x ".join(map(str, row["shape"]))
            yield f"{row['op']:46}{shape:26}{seconds * 1e6:>10.0f}{row['us']:>10.0f}{seconds * 1e6 / row['us'] - 1:>+8.0%}"


def price(row: Row, cluster: Cluster) -> float | None:
    """Seconds by this package's prices; None for what it has none for."""
    op, shape = row["op"], row["shape"]
    if op.startswith("matmul"):
        rows, columns, depth = shape
        by_kind = {"NN": (rows, depth, columns), "TN": (columns, depth, rows)}
        return gemm_s((1, *by_kind.get(op[-2:], (rows, columns, depth))), 2, cluster)
    if op.startswith("attention") and "FLASH" not in op:
        b, n, k, s, d = shape
        forward, backward = (attention_s((b, n, k, s, s, d, way, 1), 2, cluster) for way in (0, 1))
        return forward + backward if "backward" in op else forward
    if op.startswith("adamw"):
        rate = cluster["bandwidth_gb_s"] * 1e9 * cluster["optimizer_efficiency"]
        return row["bytes"] / (rate * (ADAMW_BFLOAT16 if op.endswith("bfloat16") else 1.0))
    if op.endswith("compiled") or op == "copy":
        return bytes_s(row["bytes"], cluster)
    return None


if __name__ == "__main__":
    command(main)
