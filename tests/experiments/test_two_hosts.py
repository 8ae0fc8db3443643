"""Two hosts joined by a wire: what the wire counts of a step is what the ledger says of it, under every plan."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import HostsUnavailable, JobFailed, TwoHosts
from inter_host import crossing_hops
from plans import Measured, train_counted
from support.marks import exhaustive

MESHES = {
    "fsdp_tp": {"dp_shard": 2, "tp": 2},
    "fsdp": {"dp_shard": 4},
    "hsdp": {"dp_replicate": 2, "dp_shard": 2},
    "tp": {"tp": 4},
}
TOLERANCE = 0.03


@pytest.fixture(scope="module")
def hosts() -> Iterator[TwoHosts]:
    try:
        with TwoHosts() as two:
            yield two
    except HostsUnavailable as reason:
        pytest.skip(f"two hosts cannot be made here: {reason}")


EVERY_DAY = ("fsdp_tp", "hsdp")


@pytest.fixture(scope="module")
def measured(
    hosts: TwoHosts, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, list[Measured]]:
    """Two steps of every plan that is tested, in one job: megabytes per step, and hardly any arithmetic."""
    cases = (getattr(item, "callspec", None) for item in request.session.items)
    chosen = {case.params.get("parallel") for case in cases if case}
    plans = [plan for plan in MESHES if plan in chosen]
    small = [
        *("model=llama2_tiny", "model.dim=128", "model.ffn_dim=384", "model.vocab_size=4096"),
        *("data=random_tokens", "data.seq_len=128", "tokenizer.vocab_size=300"),
        *("train.global_batch_size=8", "train.steps=2", "train.eval_rows=4", "logger=none", "device=cpu"),
    ]
    trainings = [[f"parallel={parallel}", *small] for parallel in plans]
    of_all = train_counted(hosts, trainings, tmp_path_factory.mktemp("runs"))
    assert not hosts.processes()
    return dict(zip(plans, of_all, strict=True))


@pytest.mark.cli
@pytest.mark.parametrize("parallel", [plan if plan in EVERY_DAY else exhaustive(plan) for plan in MESHES])
def test_the_wire_counts_what_the_ledger_says(parallel: str, measured: dict[str, list[Measured]]) -> None:
    both_ways = measured[parallel]
    assert {(one.step, one.host) for one in both_ways} == {(step, host) for step in (1, 2) for host in "ab"}
    for one in both_ways:
        assert one.mesh == MESHES[parallel]
        assert one.sent.payload_bytes == pytest.approx(one.gloo_bytes, rel=TOLERANCE), one
        assert one.sent.payload_bytes < one.sent.tx_bytes
        assert one.gloo_bytes > 2e6, "too few bytes to tell 3 % from the messages around them"


@pytest.mark.cli
def test_nothing_is_left_behind(tmp_path: Path) -> None:
    two = TwoHosts()
    try:
        with two:
            asleep = subprocess.Popen(["ip", "netns", "exec", two.names["a"], "sleep", "600"])
            with pytest.raises(JobFailed, match=r"host [ab] ended with 1\b"):
                two.torchrun(["no_such_program.py"], tmp_path)
            raise KeyboardInterrupt
    except HostsUnavailable as reason:
        pytest.skip(f"two hosts cannot be made here: {reason}")
    except KeyboardInterrupt:
        pass
    assert asleep.wait(timeout=600) < 0
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
