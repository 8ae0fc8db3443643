"""`python -m tpresearch.calibrate out=FILE`: measure this machine and write a cluster file.

With a GPU, it measures matmuls by shape and under load, attention, memory, AdamW and launches on the first one; links between GPUs
and hosts are taken from base=..., a file of conf/cluster. Without a GPU, it measures one thread of the CPU, and gloo between two ranks.
"""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tpresearch.config.errors import ConfigError
from tpresearch.launch.options import command, read_options
from tpresearch.simulate.cluster import NUMBERS


@dataclass
class Options:
    out: str
    """The file to write, such as conf/cluster/here.yaml."""
    rows: str | None = None
    """Measurements to read instead of measuring: one JSON object per line, as written by experiments/gpu."""
    base: str = "h100_dgx"
    """The cluster that provides the numbers that a single GPU cannot: an option of conf/cluster."""


def main() -> None:
    options = read_options(Options, sys.argv[1:])
    path = Path(options.out)
    if path.suffix != ".yaml" or not path.parent.is_dir():
        why, legal = "not a .yaml file in a folder that exists", "such as conf/cluster/here.yaml"
        raise ConfigError("out", options.out, why, legal, {"out": "conf/cluster/here.yaml"})
    plain = _of_gpu(options, path.stem) or _of_cpu(path.stem)
    path.write_text(as_yaml(plain))
    for name, number in plain["numbers"].items():
        if number["kind"] == "measured":
            value = number["value"]
            print(f"  {name:28}{value if isinstance(value, list) else f'{value:.4g}'}")
    print(f"\n  {path}: simulate with cluster={path.stem}")


def _of_gpu(options: Options, name: str) -> dict[str, Any] | None:
    """None if no measurements are given and there is no GPU."""
    from tpresearch.calibrate.rows import Row, of_rows, read  # late: what follows imports torch

    if options.rows:
        rows = read(Path(options.rows))
    else:
        import torch

        if not torch.cuda.is_available():
            return None
        from tpresearch.calibrate.cuda import measured

        rows = list[Row](measured())
    return of_rows(rows, _base(options.base), name)


def _base(option: str) -> dict[str, Any]:
    from tpresearch.launch.composition import conf_dir

    path = conf_dir() / "cluster" / f"{option}.yaml"
    if not path.is_file():
        legal = "one of " + " ".join(sorted(file.stem for file in path.parent.glob("*.yaml")))
        raise ConfigError("base", option, "no such cluster", legal, {})
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found


def _of_cpu(name: str) -> dict[str, Any]:
    import torch

    from tpresearch.calibrate.cpu import measured

    torch.set_num_threads(1)
    cores, chip = len(os.sched_getaffinity(0)), _chip()
    source = f"tpresearch.calibrate on {platform.node()}, {chip}"
    return {
        "about": f"The CPU of {platform.node()}, measured: ranks are processes of one thread on {cores} cores.",
        "name": name,
        "device": f"a core of {chip}",
        "devices_per_host": 8,
        "hosts": 1,
        "shared_cores": cores,
        "checked": [],
        "numbers": {
            key: {"value": value, "kind": "measured", "source": source} for key, value in measured().items()
        },
    }


def _chip() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def as_yaml(plain: dict[str, Any]) -> str:
    """A cluster's file, a number per line."""
    lines = [f"# {plain['about']}"]
    for key in ("name", "device", "devices_per_host", "hosts", "shared_cores", "checked"):
        lines.append(f"{key}: {_flow(plain[key])}")
    lines.append("numbers:")
    for key in NUMBERS:
        number = plain["numbers"][key]
        value = number["value"]
        text = "[" + ", ".join(f"{v:.5g}" for v in value) + "]" if isinstance(value, list) else f"{value:.5g}"
        lines.append(f"  {key}: {{value: {text}, kind: {number['kind']}, source: {_flow(number['source'])}}}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    """On one line, quoted where YAML requires it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True)
    return text.removesuffix("...\n").strip()


if __name__ == "__main__":
    command(main, Options)
