"""Two hosts joined by a wire: what the wire counts of a step is what the ledger says of it, under every plan."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from two_hosts import counted_train
from two_hosts.hosts import ADDRESSES, HOSTS, INTERFACE, RANKS_PER_HOST, HostsUnavailable, JobFailed, TwoHosts
from two_hosts.inter_host import crossing_hops
from two_hosts.plans import Measured, measured_in, train_counted

from tpresearch.config.world import World
from tpresearch.verify.ranks import Ranks

MESHES = {
    "fsdp_tp": {"dp_shard": 2, "tp": 2},
    "fsdp": {"dp_shard": 4},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "tp": {"tp": 4},
}
TOLERANCE = 0.03
CLONE_NEWNET = 0x40000000  # of <sched.h>, and in `os` from Python 3.12


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    try:
        with TwoHosts() as two:
            yield two
    except HostsUnavailable as reason:
        pytest.skip(f"two hosts cannot be made here: {reason}")


def overrides(parallel: str) -> list[str]:
    """Two steps with megabytes to send in each, and hardly any arithmetic."""
    return [
        f"parallel={parallel}",
        *("model=llama2_tiny", "model.dim=128", "model.ffn_dim=384", "model.vocab_size=4096"),
        *("data=random_tokens", "data.seq_len=128", "tokenizer.vocab_size=300"),
        *("train.global_batch_size=8", "train.steps=2", "train.eval_rows=4", "logger=none", "device=cpu"),
    ]


def train_on_its_host(world: World, namespaces: dict[str, str], typed: list[str]) -> None:
    """What `counted_train.py` does on this rank where an agent of torchrun has started it on its host."""
    host, local_rank = HOSTS[world.rank // RANKS_PER_HOST], world.rank % RANKS_PER_HOST
    with open(f"/var/run/netns/{namespaces[host]}") as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), CLONE_NEWNET) == 0
    of_rank = World(world.rank, world.size, local_rank, RANKS_PER_HOST).environment(counted_train.FIRST_PORT)
    of_host = {"MASTER_ADDR": ADDRESSES["a"], "GLOO_SOCKET_IFNAME": INTERFACE, "HOST_NAME": host}
    no_agent = {"TORCHELASTIC_RUN_ID": "two_hosts", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    os.environ |= of_rank | of_host | no_agent
    sys.argv[1:] = typed
    counted_train.main()


def check(parallel: str, both_ways: list[Measured]) -> None:
    assert {(one.step, one.host) for one in both_ways} == {(step, host) for step in (1, 2) for host in HOSTS}
    for one in both_ways:
        assert one.mesh == MESHES[parallel]
        assert one.sent.payload_bytes == pytest.approx(one.gloo_bytes, rel=TOLERANCE), one
        assert one.sent.payload_bytes < one.sent.tx_bytes
        assert one.gloo_bytes > 2e6, "too few bytes to tell 3 % from the messages around them"


@pytest.mark.parametrize("parallel", ["fsdp_tp", "hsdp"])
def test_the_wire_counts_what_the_ledger_says(
    hosts: TwoHosts, ranks: Ranks, parallel: str, tmp_path: Path
) -> None:
    typed = [*overrides(parallel), f"hydra.run.dir={tmp_path / 'run'}"]
    ranks.run(4, train_on_its_host, hosts.names, typed)
    assert not hosts.processes()
    check(parallel, measured_in(tmp_path / "run"))


@pytest.mark.cli
@pytest.mark.exhaustive
def test_it_does_so_where_torchruns_agents_start_the_ranks(hosts: TwoHosts, tmp_path: Path) -> None:
    for parallel, both_ways in zip(
        MESHES, train_counted(hosts, [overrides(parallel) for parallel in MESHES], tmp_path), strict=True
    ):
        check(parallel, both_ways)
    assert not hosts.processes()


@pytest.mark.cli
def test_the_agents_meet_and_nothing_is_left_behind(tmp_path: Path) -> None:
    two = TwoHosts()
    program = tmp_path / "ends_with_1.py"
    program.write_text(
        "import os, pathlib, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        '(here / f\'{os.environ["HOST_NAME"]} {os.environ["RANK"]}\').touch()\n'
        "while len(list(here.glob('[ab] [0-3]'))) < 4: time.sleep(0.05)\n"
        "sys.exit(1)\n"
    )
    asleep = None
    try:
        with two:
            asleep = subprocess.Popen(["ip", "netns", "exec", two.names["a"], "sleep", "600"])
            with pytest.raises(JobFailed, match=r"host [ab] ended with 1\b"):
                two.torchrun([str(program)], tmp_path / "logs")
            raise KeyboardInterrupt
    except HostsUnavailable as reason:
        pytest.skip(f"two hosts cannot be made here: {reason}")
    except KeyboardInterrupt:
        pass
    assert asleep
    assert asleep.wait(timeout=600) < 0
    ranks_of = [{path.name[-1] for path in tmp_path.glob(f"{host} ?")} for host in HOSTS]
    assert sorted(map(sorted, ranks_of)) == [["0", "1"], ["2", "3"]]  # who comes first has the first two
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert not [name for name in two.names.values() if name in listed]


def test_without_namespaces_there_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(HostsUnavailable, match=r"no `ip` command"), TwoHosts():
        pass
    (tmp_path / "ip").write_text(
        f"#!{shutil.which('sh', path='/bin:/usr/bin')}\necho 'Operation not permitted' >&2; exit 1\n"
    )
    (tmp_path / "ip").chmod(0o755)
    with (
        pytest.raises(
            HostsUnavailable, match=r"^`ip netns add two-hosts-.*` failed: Operation not permitted$"
        ),
        TwoHosts(),
    ):
        pass


@pytest.mark.parametrize(
    ("mesh", "hosts", "hops"),
    [
        ({"dp_shard": 2, "tp": 2}, "aabb", {"dp_replicate": 0, "dp_shard": 2, "tp": 0}),
        ({"dp_shard": 2, "tp": 2}, "bbaa", {"dp_replicate": 0, "dp_shard": 2, "tp": 0}),
        ({"dp_replicate": 2, "dp_shard": 2}, "aabb", {"dp_replicate": 2, "dp_shard": 0, "tp": 0}),
        ({"dp_shard": 4}, "aabb", {"dp_replicate": 0, "dp_shard": 1, "tp": 0}),
        ({"dp_shard": 4}, "abab", {"dp_replicate": 0, "dp_shard": 2, "tp": 0}),
        ({"dp_shard": 2, "tp": 8}, "a" * 8 + "b" * 8, {"dp_replicate": 0, "dp_shard": 8, "tp": 0}),
    ],
)
def test_hops_of_a_ring_between_hosts(mesh: dict[str, int], hosts: str, hops: dict[str, int]) -> None:
    assert crossing_hops(mesh, hosts) == hops
