"""A plan trained across the two hosts: what the ledger says of a step, and what the interfaces counted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from two_hosts.hosts import HOSTS, TwoHosts
from two_hosts.inter_host import crossing_hops, gloo_bytes_each_way, ring_bytes_each_way
from two_hosts.wire import Sent

from tpresearch.ledger.entries import Entry

COUNTED_TRAIN = Path(__file__).with_name("counted_train.py")


@dataclass(frozen=True)
class Measured:
    """One direction of one step of one plan."""

    parallel: str
    mesh: dict[str, int]
    rows: int
    """Of the global batch."""
    seq_len: int
    step: int
    host: str
    """The one that sent."""
    sent: Sent
    ring_bytes: int
    gloo_bytes: int

    @property
    def ratio(self) -> float:
        """Payload on the wire over the ledger's bytes, each collective as gloo sends it."""
        return self.sent.payload_bytes / self.gloo_bytes

    def row(self) -> dict[str, Any]:
        return {
            "parallel": self.parallel,
            "mesh": " ".join(f"{axis}={size}" for axis, size in self.mesh.items()),
            "rows": self.rows,
            "seq_len": self.seq_len,
            "step": self.step,
            "host": self.host,
            "tx_bytes": self.sent.tx_bytes,
            "tx_packets": self.sent.tx_packets,
            "repeated_segments": self.sent.repeated_segments,
            "payload_bytes": self.sent.payload_bytes,
            "ledger_gloo_bytes": self.gloo_bytes,
            "ledger_ring_bytes": self.ring_bytes,
            "ratio": round(self.ratio, 5),
        }


def train_counted(hosts: TwoHosts, trainings: list[list[str]], folder: Path) -> list[list[Measured]]:
    """Train with each of these lists of overrides; for each, both directions of every step.

    Args:
        folder: new or empty; `folder/0`, `folder/1`... become the run folders.

    Raises:
        JobFailed: with the end of the agents' logs.
    """
    runs = [folder / str(number) for number in range(len(trainings))]
    lines = [
        " ".join([*overrides, f"hydra.run.dir={run}"]) for overrides, run in zip(trainings, runs, strict=True)
    ]
    hosts.torchrun([str(COUNTED_TRAIN), *lines], folder)
    return [measured_in(run) for run in runs]


def measured_in(run: Path) -> list[Measured]:
    """Both directions of every step of a run that `counted_train.py` has left."""
    summary = json.loads((run / "summary.json").read_text())
    config = yaml.safe_load((run / "config.yaml").read_text())
    entries = [Entry(**entry) for entry in json.loads((run / "ledger.json").read_text())["measured"]]
    steps = {host: _steps(run / f"wire-{host}.jsonl") for host in HOSTS}
    host_of = {rank: host for host in HOSTS for rank in steps[host][0]["ranks"]}
    hops = crossing_hops(summary["mesh"], [host_of[rank] for rank in range(summary["world_size"])])
    return [
        Measured(
            parallel=summary["parallel"],
            mesh=summary["mesh"],
            rows=config["train"]["global_batch_size"],
            seq_len=config["data"]["seq_len"],
            step=told["step"],
            host=host,
            sent=Sent(told["tx_bytes"], told["tx_packets"], told["repeated_segments"]),
            ring_bytes=ring_bytes_each_way(entries, hops),
            gloo_bytes=gloo_bytes_each_way(entries, hops),
        )
        for host in HOSTS
        for told in steps[host]
    ]


def _steps(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
