"""A 1D and a 2D DeviceMesh of eight ranks, and the process groups that torch made for them, as each rank names its own.

python experiments/tutorial/meshes.py      # prints each rank's groups; draws meshes.png (record.py says where)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt
import torch.distributed as dist
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch
from torch.distributed.device_mesh import init_device_mesh

from tpresearch.config.world import World
from tpresearch.parallel.device import CPU
from tpresearch.parallel.group import process_group
from tpresearch.verify.ranks import Ranks

HERE = Path(__file__).parent
RANKS, HOSTS = 8, 2
MESHES: dict[tuple[int, ...], tuple[str, ...]] = {(8,): ("tp",), (2, 4): ("replicate", "shard")}
"""The tutorial's two: eight GPUs of one host; two hosts of four."""
COLOURS = {"tp": "#4477aa", "shard": "#4477aa", "replicate": "#ee6677"}

Groups = dict[tuple[int, ...], dict[str, list[int]]]
"""Shape of the mesh -> axis -> the ranks of the group that this rank is in."""


def groups(world: World) -> Groups:
    """What one rank finds in each mesh."""
    found: Groups = {}
    with process_group(CPU, world):
        for shape, names in MESHES.items():
            mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
            found[shape] = {name: dist.get_process_group_ranks(mesh.get_group(name)) for name in names}
    return found


def draw(axes: Axes, shape: tuple[int, ...], seen: list[Groups]) -> None:
    """Ranks in rows of a host each, and an outline around each group."""
    columns = shape[-1]
    for rank in range(RANKS):
        axes.text(rank % columns, -(rank // columns), f"{rank}", ha="center", va="center", fontsize=13)
    for depth, name in enumerate(MESHES[shape]):
        for members in {tuple(each[shape][name]) for each in seen}:
            xs, ys = zip(*((rank % columns, -(rank // columns)) for rank in members), strict=True)
            pad = 0.3 + 0.09 * depth
            box = (min(xs) - pad, min(ys) - pad), max(xs) - min(xs) + 2 * pad, max(ys) - min(ys) + 2 * pad
            style: dict[str, Any] = {"fill": False, "edgecolor": COLOURS[name], "linewidth": 2}
            axes.add_patch(FancyBboxPatch(*box, boxstyle="round,pad=0,rounding_size=0.2", **style))
        axes.plot([], [], color=COLOURS[name], label=f'groups of "{name}"')
    named = f", mesh_dim_names={MESHES[shape]}" if len(shape) > 1 else ""
    axes.set_title(f'init_device_mesh("cuda", {shape}{named})', loc="left", fontsize=10, family="monospace")
    axes.set_xlim(-0.7, 10)
    axes.set_ylim(-(RANKS // columns) + 0.3, 0.7)
    axes.set_aspect("equal")
    axes.axis("off")
    axes.legend(loc="center right", frameon=False)


def main() -> None:
    from record import place
    from tutorial.meshes import groups as imported  # pyrefly: ignore[missing-module-attribute]  # ranks import what they run by this name

    seen: list[Groups] = Ranks().run(RANKS, imported)
    for shape, names in MESHES.items():
        print(f"mesh {shape}")
        for rank, found in enumerate(seen):
            print(f"  rank {rank}: " + "; ".join(f"{name} {found[shape][name]}" for name in names))
    figure, axes = plt.subplots(2, 1, figsize=(9, 4.4), height_ratios=[1.4, 2.2])
    for each, shape in zip(axes, MESHES, strict=True):
        draw(each, shape, seen)
    figure.tight_layout()
    figure.savefig(place(HERE) / "meshes.png", dpi=110)
    print(f"picture: {place(HERE) / 'meshes.png'}")


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    main()
