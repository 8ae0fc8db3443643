"""Whether ranks of other hosts find this one."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tpresearch.config.world import World
from tpresearch.launch import address
from tpresearch.launch.address import check_address
from tpresearch.launch.command import WrongCommand

TWO_HOSTS = World(2, 4, 0, 2, elastic=True)


@pytest.fixture(autouse=True)
def _other_host_is_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setattr(socket, "gethostname", lambda: "node2")
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "ib0")])
    monkeypatch.setattr(address, "ROUTES", Path("/none"))
    monkeypatch.setattr("sys.argv", ["train.py", "parallel=tp"])


def stands_for(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> None:
    """Let the host's name have these addresses, of which only loopback ones are its own."""

    def resolve(name: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in addresses]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)


@pytest.mark.parametrize(
    ("addresses", "means"),
    [
        (["127.0.1.1"], "stands for 127.0.1.1 alone"),
        (["203.0.113.7", "127.0.0.1"], "stands for 127.0.0.1 alone"),
        ([], "has no address"),
    ],
)
def test_a_host_that_others_would_not_find_is_refused(
    monkeypatch: pytest.MonkeyPatch, addresses: list[str], means: str
) -> None:
    stands_for(monkeypatch, *addresses)
    with pytest.raises(
        WrongCommand, match=f"^GLOO_SOCKET_IFNAME=: this host's name, node2, {means}, "
    ) as refused:
        check_address(TWO_HOSTS)
    assert str(refused.value).endswith("; the interface to them, such as eth0, ib0")
    assert str(refused.value.command).startswith("env GLOO_SOCKET_IFNAME=eth0 torchrun ")
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo")])
    with pytest.raises(WrongCommand) as alone:
        check_address(TWO_HOSTS)
    assert str(alone.value.command).startswith("env GLOO_SOCKET_IFNAME=VALUE torchrun ")
    check_address(World(1, 2, 1, 2, elastic=True))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    check_address(TWO_HOSTS)
    monkeypatch.setenv("MASTER_ADDR", "node1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    check_address(TWO_HOSTS)


def test_the_interface_of_the_default_route_is_proposed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = "Iface\tDestination\tGateway\nib0\t0000A80A\t00000000\neth1\t00000000\t0104180A\neth1\t0004180A\t00000000\n"
    (tmp_path / "route").write_text(table)
    monkeypatch.setattr(address, "ROUTES", tmp_path / "route")
    stands_for(monkeypatch, "127.0.1.1")
    with pytest.raises(WrongCommand, match=r"the interface to them, such as eth1, ib0$") as refused:
        check_address(TWO_HOSTS)
    assert str(refused.value.command).startswith("env GLOO_SOCKET_IFNAME=eth1 torchrun ")


def test_a_host_whose_name_is_its_address_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket.socket, "bind", lambda *_: None)
    stands_for(monkeypatch, "203.0.113.7", "127.0.1.1")
    check_address(TWO_HOSTS)
