"""`python -m tpresearch.calibrate out=FILE`: measure this machine and write a cluster file.

With a GPU, it measures matmuls by shape and under load, attention, memory, AdamW and launches on the first one, and NCCL's
collectives between the GPUs of this host; under torchrun those of the job's ranks, also between hosts. What it does not measure is
taken from base=..., a file of conf/cluster. Without a GPU, it measures one thread of the CPU, and gloo between ranks.

    torchrun --nnodes=2 --nproc-per-node=8 ... -m tpresearch.calibrate out=FILE
"""

from __future__ import annotations

import math
import os
import platform
import re
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import yaml

from tpresearch.calibrate.rows import CALIBRATED, Row, cluster_from_rows, measured_number, read_rows
from tpresearch.config.errors import ConfigError, refuse_unwritable
from tpresearch.config.world import World, usable_cores
from tpresearch.launch import composition
from tpresearch.launch.options import command, read_options
from tpresearch.simulate.cluster import NUMBERS, parse_cluster


@dataclass
class Options:
    out: str
    """The file to write, such as conf/cluster/here.yaml."""
    rows: str | None = None
    """Measurements to read instead of measuring: one JSON object per line, as written by experiments/gpu."""
    run: str | None = None
    """A run's folder: instead of measuring, the base's rates are scaled so that its step is predicted as it was measured."""
    base: str | None = None
    """The cluster that provides the numbers that are not measured, an option of conf/cluster: by default one of such GPUs."""


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    path = Path(os.path.expanduser(options.out))
    if path.suffix != ".yaml" or not path.parent.is_dir():
        why, legal = "not a .yaml file in a folder that exists", "such as conf/cluster/here.yaml"
        raise ConfigError("out", options.out, why, legal, {"out": "conf/cluster/here.yaml"})
    with refuse_unwritable("out", path):  # before minutes of measuring
        path.open("a", encoding="utf-8").close() if path.exists() else TemporaryFile(dir=path.parent).close()
    plain = _new_cluster(options, path.stem, World.from_environment())
    if plain is None:
        return
    try:
        parse_cluster(plain)  # so that an invalid file is never written
    except ConfigError as error:
        if options.base is None:
            raise
        why = f"it has other GPUs than the one measured: {error.field} would be {error.value}"
        raise ConfigError("base", options.base, why, "a cluster of such GPUs", {}) from error
    with refuse_unwritable("out", path):
        path.write_text(as_yaml(plain), encoding="utf-8")
    if options.run is not None:
        print(f"  {plain['checked'][0]}")
    else:
        for name, number in plain["numbers"].items():
            if number["source"].startswith(CALIBRATED):
                value = number["value"]
                print(f"  {name:28}{value if isinstance(value, list) else f'{value:.4g}'}")
    print(f"\n  {path}: {how_to_use(path)}")


def how_to_use(path: Path) -> str:
    """How simulate takes a cluster file: of another folder than conf/cluster, by Hydra's search path."""
    folder = path.parent.resolve()
    if folder == (composition.conf_dir() / "cluster").resolve():
        return f"simulate with cluster={path.stem}"
    if folder.name == "cluster":
        return (
            f"simulate with {shlex.quote(f'hydra.searchpath=[file://{folder.parent}]')} cluster={path.stem}"
        )
    return f"move it to conf/cluster, and simulate with cluster={path.stem}"


def _new_cluster(options: Options, name: str, world: World) -> dict[str, Any] | None:
    """The content of the file to write; None on ranks that only take part in measuring links.

    Raises:
        ConfigError: for ranks of torchrun without GPUs of their own, or with nothing to measure; for rows and runs that tell
            nothing; and for a base that is not of such devices.
    """
    if options.run is not None:
        if options.rows is not None:
            raise ConfigError("rows", options.rows, "a run is read instead", "either of them", {"rows": None})
        _refuse_ranks(world, "it reads a run that was measured")
        return _cluster_of_run(Path(os.path.expanduser(options.run)), options.base, name)
    if options.rows is not None:
        _refuse_ranks(world, "it reads rows that were measured")
        return _cluster_of_rows(Path(os.path.expanduser(options.rows)), options.base, name)
    import torch  # late, and so are those that import it

    if torch.cuda.is_available():
        return _cluster_of_gpus(options.base, name, world)
    _refuse_ranks(world, "without a GPU it starts its own ranks")
    if options.base is not None:
        why = "there is no GPU here, and what is measured of a CPU needs no other cluster"
        raise ConfigError("base", options.base, why, "rows=FILE of a GPU, or no base", {"base": None})
    return _cluster_of_cpu(name)


def _cluster_of_run(folder: Path, base: str | None, name: str) -> dict[str, Any]:
    """The base, with its rates scaled so that the run's step is predicted as it was measured."""
    from tpresearch.calibrate.run import cluster_from_run, read_run

    run = read_run(folder)
    return cluster_from_run(run, _base_cluster(base, run.device, 0, allows_cpu=True), name)


def _cluster_of_rows(path: Path, base: str | None, name: str) -> dict[str, Any]:
    rows = read_rows(path)
    card: Row = next((row for row in rows if row.get("card")), {})
    return cluster_from_rows(
        rows, _base_cluster(base, card.get("card", ""), card.get("memory_bytes", 0)), name
    )


def _cluster_of_gpus(base: str | None, name: str, world: World) -> dict[str, Any] | None:
    import torch

    from tpresearch.calibrate.cuda import measure_gpu
    from tpresearch.calibrate.links import measure_links

    if not world.own_device and world.local_size > torch.cuda.device_count():
        _refuse_ranks(world, f"{world.local_size} ranks per host have {torch.cuda.device_count()} GPUs")
    chip = torch.cuda.get_device_properties(0)
    plain = _base_cluster(base, chip.name, chip.total_memory)  # before anything is measured
    links = measure_links(world)
    return cluster_from_rows([*measure_gpu(), *links], plain, name) if world.rank == 0 else None


def _cluster_of_cpu(name: str) -> dict[str, Any]:
    import torch

    from tpresearch.calibrate.cpu import measure_cpu

    torch.set_num_threads(1)
    cores, chip = usable_cores(), _chip()
    where = f"{platform.node()}, {chip}"
    return {
        "name": name,
        "device": f"a core of {chip}",
        "devices_per_host": 8,
        "hosts": 1,
        "shared_cores": cores,
        "checked": [],
        "numbers": {key: measured_number(value, where) for key, value in measure_cpu().items()},
    }


def _refuse_ranks(world: World, why: str) -> None:
    if world.size > 1:
        raise ConfigError("WORLD_SIZE", world.size, why, "a start by python, without torchrun", nproc=1)


def _base_cluster(
    option: str | None, card: str, memory_bytes: int, allows_cpu: bool = False
) -> dict[str, Any]:
    """The cluster that was asked for, or else the one whose devices have this chip and the nearest memory; `cpu` for a run on one.

    Raises:
        ConfigError: if there is none, or if its device is a CPU.
    """
    names = sorted(file.stem for file in (composition.conf_dir() / "cluster").glob("*.yaml"))
    if option is None and card == "cpu":
        option = "cpu"
    if option is None:
        known = {}
        for name in names:
            with suppress(ConfigError):  # a file that is not finished says nothing of these GPUs
                parse_cluster(known_one := composition.read_option("cluster", name))
                known[name] = known_one
        option = _closest_cluster(known, card, memory_bytes)
    if option not in names:
        unknown = f"no cluster of conf/cluster has such GPUs ({card or 'unnamed'})"
        why = "no such cluster" if option else unknown
        raise ConfigError("base", option, why, "one of " + " ".join(names), {})
    found = composition.read_option("cluster", option)
    if parse_cluster(found).is_cpu and not allows_cpu:
        raise ConfigError("base", option, "a CPU tells nothing of a GPU's host", "a cluster of GPUs", {})
    return found


def _closest_cluster(clusters: dict[str, dict[str, Any]], card: str, memory_bytes: int) -> str | None:
    """Name of the cluster, by the chip in the card's name ("NVIDIA H100 80GB HBM3")."""

    def distance(name: str) -> tuple[bool, float]:
        device, numbers = clusters[name]["device"], clusters[name]["numbers"]
        return ("PCIe" in device) != ("PCIe" in card), abs(numbers["memory_gb"]["value"] - memory_bytes / 1e9)

    def chip(name: str) -> str | None:
        """The first word of its device with a digit: the A100 of `NVIDIA A100 SXM4 80 GB`."""
        return next(iter(re.findall(r"\w*\d\w*", clusters[name]["device"])), None)

    words = re.split("[ -]", card)
    alike = [name for name in clusters if chip(name) in words]
    return min(alike, key=distance, default=None)


def _chip() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def as_yaml(plain: dict[str, Any]) -> str:
    """A cluster's file, a number per line."""
    of_card = "what was not measured is its base's"
    cores = plain.get("shared_cores")
    rest = f"ranks are processes of one thread that share {cores} cores" if cores else of_card
    lines = [f"# Written by tpresearch.calibrate: {plain['device']}; {rest}."]
    lines += [f"{key}: {_flow(value)}" for key, value in plain.items() if key != "numbers"]
    lines.append("numbers:")
    for key in [name for name in NUMBERS if name in plain["numbers"]]:
        number = plain["numbers"][key]
        lines.append(f"  {key}: {_flow({**number, 'value': _rounded(number['value'])})}")
    return "\n".join(lines) + "\n"


def _rounded(value: Any) -> Any:
    return [*map(_rounded, value)] if isinstance(value, list) else float(f"{value:.5g}")


def _flow(value: Any) -> str:
    """On one line, quoted where YAML requires it."""
    how: dict[str, Any] = {"default_flow_style": True, "width": math.inf, "allow_unicode": True}
    return yaml.safe_dump(value, sort_keys=False, **how).removesuffix("...\n").strip()


if __name__ == "__main__":
    command(main, Options)
