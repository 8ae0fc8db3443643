"""Two hosts on one machine: two network namespaces joined by a veth pair, and a torchrun agent in each.

Each namespace has a loopback, one interface and nothing else: whatever its processes send to the other host
passes that interface, whose counters the kernel keeps (`wire.py`). Each host has half of the machine's cores for itself.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

HOSTS = ("a", "b")
ADDRESSES = {"a": "10.77.0.1", "b": "10.77.0.2"}
INTERFACE = "eth0"
"""The same name in both: it is the only one beside `lo`."""
RANKS_PER_HOST = 2
CONGESTION = "reno"
"""It sends what the window allows. BBR, the default of some machines, paces by the bandwidth that it has seen, and with messages
of a few KB that is little for many steps."""
ENDPOINT = f"{ADDRESSES['a']}:29400"
"""Where the agents meet. Nothing else listens in these namespaces, so a fixed port is free."""
JOB_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "MASTER_", "TORCHELASTIC_", "SLURM_", "HYDRA_")

_nth = itertools.count()


class HostsUnavailable(Exception):
    """Namespaces cannot be made here; the message is the reason, in one line."""


class JobFailed(Exception):
    """An agent ended with an error or not at all; the message ends with what both have said."""


class TwoHosts:
    """Two joined namespaces that are there inside `with`, and processes in them.

    Names hold the process id, so that several can be there at once. On the way out, whatever still runs in the
    namespaces is ended and they are removed, and the veth pair with them.

    Raises:
        HostsUnavailable: on entering, where the machine or the user's rights do not allow it.
    """

    def __init__(self) -> None:
        nth = next(_nth)
        self.names = {host: f"two-hosts-{os.getpid()}-{nth}-{host}" for host in HOSTS}

    def __enter__(self) -> TwoHosts:
        if shutil.which("ip") is None:
            raise HostsUnavailable("there is no `ip` command (iproute2)")
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _build(self) -> None:
        a, b = self.names.values()
        for name in (a, b):
            _ip("netns", "add", name)
        pair = ["name", INTERFACE, "netns"]
        _ip("link", "add", *pair, a, "type", "veth", "peer", *pair, b)
        for host, name in self.names.items():
            _ip("-n", name, "addr", "add", f"{ADDRESSES[host]}/24", "dev", INTERFACE)
            for interface in ("lo", INTERFACE):
                _ip("-n", name, "link", "set", interface, "up")
            # It mounts /sys, which may be forbidden where all else is not.
            _ip("netns", "exec", name, "sysctl", "-qw", f"net.ipv4.tcp_congestion_control={CONGESTION}")

    def close(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._end_processes(number, patience_s=5)
        for name in self.names.values():
            if name in _listed("list"):
                subprocess.run(["ip", "netns", "delete", name], check=False)

    def _end_processes(self, number: int, patience_s: float) -> None:
        deadline = time.monotonic() + patience_s
        signalled: set[int] = set()
        while (running := self.processes()) and time.monotonic() < deadline:
            for process in running - signalled:
                try:
                    os.kill(process, number)
                except ProcessLookupError:
                    continue  # it ended by itself
            signalled |= running
            time.sleep(0.05)

    def processes(self) -> set[int]:
        """Ids of what runs in the two namespaces."""
        there = _listed("list")
        return {int(word) for name in self.names.values() if name in there for word in _listed("pids", name)}

    def torchrun(self, program: list[str], log_folder: Path, timeout_s: float = 1800) -> None:
        """Run a program on 2 x 2 ranks, one agent a host, which meet by c10d rendezvous over the veth.

        Host a keeps the rendezvous' store. Which host gets ranks 0 and 1 is settled by who comes first, and told
        to the program by HOST_NAME, `a` or `b`.

        Raises:
            JobFailed: if an agent fails, or the job has not ended after `timeout_s`.
        """
        log_folder.mkdir(parents=True, exist_ok=True)
        logs = {host: log_folder / f"agent-{host}.log" for host in HOSTS}
        with self._agents(program, logs) as agents:
            deadline = time.monotonic() + timeout_s
            while any(agent.poll() is None for agent in agents) and time.monotonic() < deadline:
                if any(agent.poll() for agent in agents):
                    break
                time.sleep(0.05)
            codes = [agent.poll() for agent in agents]
        if codes != [0, 0]:
            said = "\n".join(f"{path}:\n{path.read_text(errors='replace')[-3000:]}" for path in logs.values())
            ended = ["did not end" if code is None else f"ended with {code}" for code in codes]
            raise JobFailed(f"the agent of host a {ended[0]}, that of host b {ended[1]}\n{said}")

    @contextmanager
    def _agents(self, program: list[str], logs: dict[str, Path]) -> Iterator[list[subprocess.Popen[bytes]]]:
        agents = []
        try:
            for host in HOSTS:
                with logs[host].open("wb") as log:
                    # A session of its own: Ctrl-C reaches us alone, and we end what runs in the namespaces.
                    agents.append(
                        subprocess.Popen(
                            self._command(host, program),
                            env=_environment(host),
                            stdout=log,
                            stderr=subprocess.STDOUT,
                            start_new_session=True,
                            preexec_fn=partial(os.sched_setaffinity, 0, cores_of(host)),
                        )
                    )
            yield agents
        finally:
            for number in (signal.SIGTERM, signal.SIGKILL):
                self._end_processes(number, patience_s=5)
            for agent in agents:
                agent.wait()

    def _command(self, host: str, program: list[str]) -> list[str]:
        return [
            *("ip", "netns", "exec", self.names[host]),
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes=2", f"--nproc-per-node={RANKS_PER_HOST}"),
            *("--rdzv-backend=c10d", f"--rdzv-endpoint={ENDPOINT}", "--rdzv-id=two_hosts"),
            f"--rdzv-conf=is_host={int(host == HOSTS[0])}",  # both have this machine's name: torchrun cannot guess
            f"--local-addr={ADDRESSES[host]}",
            *program,
        ]


def cores_of(host: str) -> set[int]:
    """A host's share of the cores; with a single core, both have it."""
    cores = sorted(os.sched_getaffinity(0))
    return set(cores[HOSTS.index(host) :: len(HOSTS)] or cores)


def _environment(host: str) -> dict[str, str]:
    outside = {key: value for key, value in os.environ.items() if not key.startswith(JOB_VARIABLES)}
    ours = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": INTERFACE, "HOST_NAME": host}
    return {**outside, **ours}


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise HostsUnavailable(f"`ip {' '.join(words)}` failed: {said[-1] if said else done.returncode}")


def _listed(*words: str) -> list[str]:
    """First words of what `ip netns` lists: names, or process ids."""
    done = subprocess.run(["ip", "netns", *words], capture_output=True, text=True)
    return [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
