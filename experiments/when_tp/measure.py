"""When does tensor parallelism pay? FSDP alone against FSDP with TP inside a host, from 8 to 65,536 ranks, on H100 and A100.

python experiments/when_tp/measure.py     # prints the table, writes results.csv and when_tp.png (record.py says where)

Every cell is a step of the code that trains, as rank 0 of that many ranks, priced for both clusters; the global batch is
the same everywhere, so that past its number of rows only tensor parallelism can use more ranks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))
from record import place, write_rows

from tpresearch.api import load
from tpresearch.config.errors import ConfigError
from tpresearch.config.validate import validate
from tpresearch.launch.composition import read_option
from tpresearch.simulate.cluster import parse_cluster
from tpresearch.simulate.compiled_blocks import CompiledBlock
from tpresearch.simulate.depth import recording
from tpresearch.simulate.prediction import predict

HERE = Path(__file__).parent
ROWS = 8192
"""Of the global batch: 34 million tokens."""
WORLDS = (8, 64, 512, 2048, 8192, 65_536)
DEGREES = (1, 2, 8)
CLUSTERS = ("h100_dgx", "a100_80")
COMMON = (
    "model=llama2_7b",
    "tokenizer=bpe_32k",
    "data=random_tokens",
    "data.seq_len=4096",
    "train.dtype=bfloat16",
    "parallel.activation_checkpointing=selective",
    f"train.global_batch_size={ROWS}",
    "train.micro_batch_size=1",
    "parallel.compile=true",
)


def main() -> None:
    clusters = {name: parse_cluster(read_option("cluster", name)) for name in CLUSTERS}
    found = []
    blocks: dict[int, CompiledBlock] = {}
    for world in WORLDS:
        for degree in DEGREES:
            plan = ["parallel=fsdp"] if degree == 1 else ["parallel=fsdp_tp", f"mesh.tp={degree}"]
            try:
                cfg = load(*COMMON, *plan, config_name="simulate")
                sizes = validate(cfg, world, -(-world // 8))
            except ConfigError as error:
                print(f"{world:>7,} ranks, tp={degree}: {error.why}", flush=True)
                continue
            recorded = recording(cfg, sizes)
            # Whatever the number of ranks that shard weights, blocks are compiled alike.
            blocks[degree] = recorded.block = blocks.get(degree) or recorded.block
            for name, cluster in clusters.items():
                one = predict(recorded, cluster, check=False)
                exposed = {
                    axis: sum(e["exposed_s"] for e in one.communication if e["axis"] == axis)
                    for axis in ("dp_shard", "tp")
                }
                row = {
                    "cluster": name,
                    "ranks": world,
                    "tp": degree,
                    "step_s": round(one.step_time_s, 4),
                    "low_s": round(one.low_s, 4),
                    "high_s": round(one.high_s, 4),
                    "tokens_per_second_per_device": round(one.tokens_per_second_per_device, 1),
                    "mfu": round(one.mfu or 0, 4),
                    "exposed_dp_shard": round(exposed["dp_shard"] / one.step_time_s, 4),
                    "exposed_tp": round(exposed["tp"] / one.step_time_s, 4),
                    "memory_gb": round(one.peak_bytes / 1e9, 2),
                    "fits": one.fits,
                }
                found.append(row)
                print(
                    f"{world:>7,} ranks, tp={degree}, {name:9} {row['tokens_per_second_per_device']:>9,.0f} tok/s/device, MFU {row['mfu']:.1%}, "
                    f"waits for dp_shard {row['exposed_dp_shard']:.1%}, tp {row['exposed_tp']:.1%}, {row['memory_gb']:.0f} GB",
                    flush=True,
                )
    write_rows(place(HERE) / "results.csv", found)
    draw(found)


def draw(found: list[dict[str, Any]]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for nth, name in enumerate(CLUSTERS, 1):
        axes = figure.add_subplot(1, 2, nth)
        for degree in DEGREES:
            mine = [row for row in found if row["cluster"] == name and row["tp"] == degree]
            label = "FSDP alone" if degree == 1 else f"FSDP, tp={degree}"
            axes.plot(
                [row["ranks"] for row in mine], [100 * row["mfu"] for row in mine], marker="o", label=label
            )
        axes.set(
            xscale="log",
            xlabel="ranks",
            ylabel="MFU, %, predicted",
            title=f"Llama2-7B, 34M tokens per step, {name}",
        )
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(place(HERE) / "when_tp.png", dpi=110)


if __name__ == "__main__":
    main()
