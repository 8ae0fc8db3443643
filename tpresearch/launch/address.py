"""The address at which this host's ranks are found by those of other hosts."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from tpresearch.config.world import World
from tpresearch.launch.command import Command, WrongCommand

INTERFACE = "GLOO_SOCKET_IFNAME"
"""gloo's variable for the network interface to use. On GPUs, checkpoints and agreements go over gloo too."""
ROUTES = Path("/proc/net/route")
"""Linux's table of IPv4 routes: interface, destination (0 by default) and more."""
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")
"""Where torchruns of one machine meet that pretend to be several hosts."""


def check_address(world: World) -> None:
    """Refuse a host that ranks of other hosts would look for on their own: gloo tells them the address of this host's name,
    which /etc/hosts may have as 127.0.1.1, or, where the name has none, 127.0.0.1. To name the interface is proposed.
    """
    if world.hosts == 1 or os.environ.get(INTERFACE) or os.environ.get("MASTER_ADDR") in THIS_MACHINE:
        return
    name = socket.gethostname()
    address = _own_address(name)
    if address and not ip_address(address).is_loopback:
        return
    means = f"stands for {address} alone" if address else "has no address"
    why = f"this host's name, {name}, {means}, so that ranks of other hosts would not find it"
    interfaces = _interfaces()
    command = f"env {INTERFACE}={interfaces[0]} {Command.from_argv(world)}"
    raise WrongCommand(INTERFACE, "", why, f"the interface to them, such as {', '.join(interfaces)}", command)


def _interfaces() -> list[str]:
    """Interfaces that packets leave by, that of the default route first; all but loopback where the kernel lists no routes."""
    with suppress(OSError):
        routes = [line.split()[:2] for line in ROUTES.read_text(encoding="ascii").splitlines()[1:]]
        if names := [name for name, _ in sorted(routes, key=lambda route: route[1] != "00000000")]:
            return list(dict.fromkeys(names))
    return [name for _, name in socket.if_nameindex() if name != "lo"] or ["VALUE"]


def _own_address(name: str) -> str | None:
    """The first address of a name that is one of this host, as gloo chooses it (torch 2.13)."""
    with suppress(OSError):
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        for family, kind, protocol, _, (address, *rest) in found:
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind((address, *rest))
                return str(address).partition("%")[0]
    return None
